"""What a recording of targets is asked to do: its options, and its opened inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.models import Model
from pkt.records import Plan, SampleSet
from pkt.targets import Shard, layout

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Config:
    """The options that change the targets."""

    top_k: int = 64  #: logits an answer token, at most ``rows``
    rows: int = 0  #: tokens of the vocabulary that teacher and student share
    dtype: str = "BF16"  #: computed in: "F32" or "BF16"


@dataclass(frozen=True)
class Task:
    """Everything that a recording needs, opened and planned."""

    teacher: Model
    samples: SampleSet
    vocabulary_sha256: str
    plan: Plan
    config: Config
    data_options: Mapping[str, Any]  #: template, max_tokens, max_examples

    @cached_property
    def shards(self) -> list[Shard]:
        """The files that the result has."""
        return layout([sample.loss_tokens for sample in self.samples.samples], self.config.top_k)

    @property
    def spool_dir(self) -> Path | None:
        """Where the user wants hidden states meanwhile."""
        given = self.plan.room.spool_dir if self.plan.room else None
        return Path(given) if given else None

    def identity(self) -> dict[str, Any]:
        """What makes a recording this one: the manifest without what it found."""
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "targets",
            "teacher": self.teacher.hashes(),
            "data": {
                "count": len(self.samples.samples),
                "left_out": len(self.samples.masked),
                "tokens": self.samples.tokens,
                "loss_tokens": self.samples.loss_tokens,
                "sha256": self.samples.sha256,
            },
            "vocabulary": {"rows": self.config.rows, "sha256": self.vocabulary_sha256},
            "options": {
                "top_k": self.config.top_k,
                "dtype": self.config.dtype,
                **self.data_options,
            },
        }
