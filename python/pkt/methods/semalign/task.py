"""What a pair's quality report is asked of: two opened models, texts, and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pkt
from pkt.models import Model
from pkt.records import AlignPlan, LayerPair, Sample, SampleSet, SharedTokens

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
STATES = 1024  # positions whose states are kept, at most
LENS_STATES = 4096  # states, of all paired layers together, whose logits are compared, at most


@dataclass(frozen=True, slots=True)
class Texts:
    """The same texts as one model reads them, and the positions that are looked at."""

    samples: tuple[Sample, ...]
    positions: tuple[tuple[int, ...], ...]  #: of each, ascending; of both models the same places


@dataclass(frozen=True, slots=True)
class QualityTask:
    """Everything that the report needs, opened and found to fit."""

    teacher: Model
    student: Model
    shared: SharedTokens
    seeds: SampleSet  #: as the teacher reads them
    teacher_texts: Texts
    student_texts: Texts
    pairs: Sequence[LayerPair]
    maps: tuple[str, ...]
    fold_norm: bool
    dtypes: tuple[str, str]  #: computed in: "F32" or "BF16", of the teacher and of the student
    plan: AlignPlan
    seed_options: dict[str, Any]  #: template, max_tokens, limit
    seed: int = 0

    @property
    def states(self) -> int:
        """Positions that are looked at."""
        return sum(map(len, self.teacher_texts.positions))

    def tokens_sha256(self) -> str:
        """Hash of the shared tokens."""
        return hashlib.sha256(json.dumps(list(self.shared.pairs)).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What makes a report this report: the manifest without what it found."""
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "semalign-quality",
            "teacher": self.teacher.hashes(),
            "student": self.student.hashes(),
            "seeds": {
                "count": len(self.seeds.samples),
                "tokens": self.seeds.tokens,
                "loss_tokens": self.seeds.loss_tokens,
                "sha256": self.seeds.sha256,
            },
            "tokens_sha256": self.tokens_sha256(),
            "options": {
                "maps": list(self.maps),
                "fold_norm": self.fold_norm,
                "dtypes": list(self.dtypes),
                "seed": self.seed,
                **self.seed_options,
            },
        }
