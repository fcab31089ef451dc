"""What a run found and what it cost, as the two JSON files of its folder hold them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from pkt.host import Costs, PeakMeter, describe
from pkt.methods.seeking.steps import Scores, Start
from pkt.methods.seeking.task import DTYPES, Task
from pkt.products import multiplied_in
from pkt.records import Reading, Window
from pkt.sensitivity import scorer
from pkt.stream import CheckpointSource


def manifest(task: Task, scores: Scores, layers: list[int], start: Start) -> dict[str, Any]:
    """`pkt_manifest.json`: what was asked and what was found, the same for the same input."""
    found = {
        **task.identity(),
        "loss": sum(scores.losses) / len(scores.losses),
        "layer_scores": scores.layers,
        "layers": layers,
        "windows": {key: _window(window) for key, window in start.windows.items()},
    }
    return found | ({"consistent": start.network.as_json()} if start.network else {})


def _window(window: Window) -> dict[str, Any]:
    entry: dict[str, Any] = {"teacher": window.teacher}
    if window.rows is not None and window.cols is not None:
        entry |= {"rows": list(window.rows), "cols": list(window.cols)}
    else:
        entry["sha256"] = window.mask_sha256
    return entry | {"score": window.score, "kv_repeat": window.kv_repeat}


def run_record(
    task: Task, source: CheckpointSource, reading: Reading, costs: Costs, peak: PeakMeter
) -> dict[str, Any]:
    """`pkt_run.json`: what this process did and what it cost."""
    counts, dtype = source.counts(), DTYPES[task.config.dtype]
    read = counts["bytes"] + counts["bytes_out_of_turn"]
    seconds = counts.get("read_seconds", 0.0)
    return {
        "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
        "bytes_read": read,
        "checkpoint_bytes": task.teacher.checkpoint.bytes,
        "gigabytes_per_second": round(counts["bytes"] / seconds / 1e9, 3) if seconds else None,
        "stalls": counts.get("stalls", 0),
        "stall_seconds": round(counts.get("stall_seconds", 0.0), 3),
        "peak_anonymous_bytes": peak.peak_bytes,
        "planned_bytes": task.plan.peak_bytes,
        "budget_bytes": task.plan.budget_bytes,
        "io": source.mode,
        "io_reason": reading.reason,
        "io_rates": {mode: round(rate, 3) for mode, rate in reading.rates.items()},
        "notices": source.notices,
        "slots": task.plan.slots,
        "scores": task.plan.scores,
        "scorer": scorer(source.device),
        "multiplied_in": str(multiplied_in(dtype, source.device)).removeprefix("torch."),
        "spool_every": task.plan.spool_every,
        "processes": task.processes,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "host": describe(),
    }
