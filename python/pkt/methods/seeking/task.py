"""What an extraction is asked to do: its options, and its opened inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pkt
from pkt.models import Model
from pkt.projections import Pair
from pkt.records import LayerRule, Plan, SampleSet, Select, Split

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Config:
    """The options that change the result of an extraction."""

    rank: int = 16
    layers: LayerRule = "sensitivity"
    select: Select = "window"
    split: Split = "paper"
    targets: tuple[str, ...] | None = None  #: roles or module names; None: all projections
    embeddings: bool = False
    dtype: str = "BF16"  #: computed in: "F32" or "BF16"
    seed: int = 0  #: of the random strategies


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that a run needs, opened and found to fit."""

    teacher: Model
    student: Model
    seeds: SampleSet
    pairs: Sequence[Pair]
    plan: Plan
    config: Config
    seed_options: Mapping[str, Any]  #: template, max_tokens, limit
    base_model: str  #: the student as the user named it, for the adapter and its card
    processes: int = 1  #: that share the seeds

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: the manifest without what it found."""
        config = self.config
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "seeking",
            "teacher": self.teacher.hashes(),
            "student": self.student.hashes(),
            "seeds": {
                "count": len(self.seeds.samples),
                "tokens": self.seeds.tokens,
                "loss_tokens": self.seeds.loss_tokens,
                "sha256": self.seeds.sha256,
            },
            "options": {
                "rank": config.rank,
                "layers": config.layers,
                "select": config.select,
                "split": config.split,
                "targets": list(config.targets) if config.targets else None,
                "embeddings": config.embeddings,
                "dtype": config.dtype,
                "seed": config.seed,
                **self.seed_options,
            },
        }
