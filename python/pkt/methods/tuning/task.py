"""What a training run is asked to do: its options, and its opened inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.methods.tuning.starts import Form
from pkt.models import Model
from pkt.records import LowRank, Plan, SampleSet
from pkt.targets import Kernels
from pkt.training import Objective, Schedule

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Config:
    """The options that change the result of a training run, the schedule's among them."""

    init: str = "lora"  #: "extracted", "lora", "pissa" or "gaussian"
    form: Form = field(default_factory=Form)
    rank: int = 16
    targets: tuple[str, ...] | None = None  #: of lora, pissa and gaussian; None: all projections
    embeddings: bool = False  #: of the same: embedding and head too
    layers: tuple[int, ...] | None = None  #: of the same, from 1; None: all of the student's
    dropout: float = 0.05
    dtype: str = "BF16"  #: of the student's weights: "F32" or "BF16"
    distill: str | None = None  #: "topk-kl" or "kl": learn from a teacher's logits
    distill_weight: float = 1.0  #: of the divergence; the rest is the labels' cross-entropy
    alignment: Mapping[str, Any] | None = None  #: objective, interface, output_loss, kl_weight
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, slots=True)
class Taught:
    """What a teacher in memory makes of a run."""

    objective: Objective
    layers: tuple[int, ...] | None  #: that its pairs are of; None: those of the options
    found: Mapping[str, Any]  #: for the manifest
    close: Callable[[], None]  #: gives the teacher's memory back
    kernels: Kernels | None = None  #: of its layers; None: they are not compared


@dataclass(frozen=True, slots=True)
class Online:
    """A teacher that stays in memory while the student learns."""

    origin: Mapping[str, Any]  #: what makes it this teacher, for the manifest
    weights: Mapping[str, int]  #: state of its files: an unfinished run goes on with these alone
    plan: Plan  #: of both
    teach: Callable[[Path, torch.device, Callable[[str, int, int], None]], Taught]
    """Reads it; given OUT/.work, where to, and what is told of progress."""


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that a training run needs, opened and found to fit."""

    student: Model
    tokenizer: Any
    samples: SampleSet
    held_out: SampleSet | None
    start: Mapping[str, LowRank] | None  #: of an extraction, by full module name
    norms: Mapping[str, float] | None  #: ‖B₀A₀‖_F of an extraction, by the same names
    origin: Mapping[str, Any]  #: hashes of the extraction that start or norms come from
    config: Config
    data_options: Mapping[str, Any]  #: template, max_tokens, max_examples
    base_model: str  #: the student as the user named it, for the adapter and its card
    processes: int = 1
    teacher: Mapping[str, Any] | None = None  #: of it and of its targets, if it teaches
    objective: Objective | None = None  #: the loss that these targets make; None: the labels'
    online: Online | None = None  #: makes the objective, where it is not made of files
    found: Mapping[str, Any] = field(default_factory=dict)  #: by it, for the manifest
    kernels: Kernels | None = None  #: of the teacher's layers; None: they are not compared

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: the manifest without what it found."""
        config, schedule = self.config, asdict(self.config.schedule)
        chosen: dict[str, Any] = {"layers": list(config.layers)} if config.layers else {}
        if self.online and config.alignment:
            chosen = {}  # they follow from what is asked; attribution may have to find them
        if config.distill:
            chosen |= {"distill": config.distill, "distill_weight": config.distill_weight}
        chosen |= config.alignment or {}
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "tuning",
            "student": self.student.hashes(),
            "start": {
                "init": config.init,
                "form": config.form.name,
                "scale": config.form.scale,
                **self.origin,
            },
            **({"targets": self.teacher} if self.teacher else {}),
            "data": _describe(self.samples),
            "eval_data": _describe(self.held_out) if self.held_out else None,
            "options": {
                "rank": config.rank,
                "targets": list(config.targets) if config.targets else None,
                "embeddings": config.embeddings,
                "dropout": config.dropout,
                "dtype": config.dtype,
                **chosen,
                **schedule,
                **self.data_options,
            },
            "processes": self.processes,
        }


def _describe(samples: SampleSet) -> dict[str, Any]:
    return {
        "count": len(samples.samples),
        "left_out": len(samples.masked),
        "tokens": samples.tokens,
        "loss_tokens": samples.loss_tokens,
        "sha256": samples.sha256,
    }
