"""What a training run found and what it cost, as the two JSON files of its folder hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from pkt.host import Costs, PeakMeter, describe
from pkt.methods.tuning.export import Exported
from pkt.methods.tuning.task import Task
from pkt.similarity import kernel_cka
from pkt.targets import Kernels
from pkt.training import StepZero


def manifest(
    task: Task,
    step_zero: StepZero,
    exported: Exported,
    metrics: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """`pkt_manifest.json`: what was asked and what was found."""
    losses = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    return {
        **task.identity(),
        **task.found,
        "steps": int(metrics[-1]["step"]),
        "loss": [row["loss"] for row in metrics if "loss" in row][-1],
        "eval_loss": {"student": losses[0], "tuned": losses[-1]} if losses else None,
        "step_zero": {"difference": step_zero.difference, "bound": step_zero.bound},
        "rank": exported.rank,
        "export": {"difference": exported.check.difference, "bound": exported.check.bound},
    }


def similarity(teacher: Kernels, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """Linear CKA of each teacher layer with each student layer, before and after; 4 decimals."""
    both = {
        name: [[round(value, 4) for value in row] for row in kernel_cka(teacher.layers, ours)]
        for name, ours in (("before", before), ("after", after))
    }
    return {"positions": len(teacher.places), **both}


def run_record(costs: Costs, peak: PeakMeter, trainable: int) -> dict[str, Any]:
    """`pkt_run.json`: what this process did and what it cost."""
    return {
        "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
        "trainable_parameters": trainable,
        "peak_anonymous_bytes": peak.peak_bytes,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "host": describe(),
    }
