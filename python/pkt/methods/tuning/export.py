"""The product: one plain LoRA on the untouched student, checked against the trained model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.adapter import check_adapter, side_by_side, write_factors
from pkt.methods.tuning.task import DTYPES, Task
from pkt.training import StepZero, compare_logits, first_logits, frozen_factors, trained_factors

FLOAT32_BOUND = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """The rank that was written, and how far its logits lie from the trained model's."""

    rank: int
    check: StepZero


def write_tuned(task: Task, model: Any, folder: Path) -> Exported:
    """Write the exported adapter of a trained model into ``folder`` and load it back.

    ``[B | −B₀]`` and ``[A ; A₀]``: rank 2r where something was frozen, r where nothing was.

    Args:
        task: what was trained.
        model: the PEFT model; its LoRA layers are taken off again.
        folder: existing.

    Raises:
        PktError: student + exported adapter are not the trained model (float32: 1e-4).

    """
    from peft import PeftModel

    samples = task.samples.samples
    trained = first_logits(model, samples)
    factors = side_by_side(trained_factors(model), frozen_factors(model))
    base = model.unload()
    del model
    rank = write_factors(folder, factors, dict(base.named_modules()), task.base_model)
    check_adapter(folder, task.student.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on tied embeddings: what it warns of is not done
        loaded = PeftModel.from_pretrained(base, str(folder))
    dtype = DTYPES[task.config.dtype]
    check = compare_logits(trained, first_logits(loaded, samples), dtype, task.student.layers)
    if dtype == torch.float32:  # another order of sums: relative where logits are large
        largest = max(float(logits.abs().max()) for logits in trained)
        check = StepZero(check.difference, FLOAT32_BOUND * max(1.0, largest))
    check.require(f"{folder}: the exported adapter is not what was trained")
    return Exported(rank, check)
