"""LoRA fine-tuning from a start: the student is its own function at step 0, then it learns.

It learns from the labels, from a teacher's logits (`Distillation`), or from its activations
(`Alignment`).

Scheduling, accumulation, mixed precision, checkpoints and processes are transformers' Trainer's;
what is ours is how a start enters the model (`inject`), the proof that nothing has changed by it
(`first_logits`, `StepZero`), and which checkpoint a killed run continues from.
"""

from pkt.training.activations import Activations, Readout, View, watching
from pkt.training.alignment import ALIGNMENTS, Alignment
from pkt.training.injection import frozen_factors, inject, trained_factors
from pkt.training.loop import Schedule, fit, steps_in_all
from pkt.training.objective import (
    Distillation,
    Objective,
    Said,
    Totals,
    WholeDistillation,
    divergence,
)
from pkt.training.stages import Stages, require_stages
from pkt.training.stepzero import StepZero, compare_logits, first_logits

__all__ = [
    "ALIGNMENTS",
    "Activations",
    "Alignment",
    "Distillation",
    "Objective",
    "Readout",
    "Said",
    "Schedule",
    "Stages",
    "StepZero",
    "Totals",
    "View",
    "WholeDistillation",
    "compare_logits",
    "divergence",
    "first_logits",
    "fit",
    "frozen_factors",
    "inject",
    "require_stages",
    "steps_in_all",
    "trained_factors",
    "watching",
]
