"""What a teacher says of the training data, written in one streamed pass over its weights.

A student then learns from a teacher that never was in memory: from its k largest logits at each
answer token and the sum over all of them (`pkt.targets`). Every example goes through layer i before
any meets layer i + 1, as in an extraction, so the teacher is read once, whatever the number of
examples; only the hidden states before and behind the layer in use are on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pkt.host import Costs, PeakMeter, describe, one_thread
from pkt.methods.targeting.shards import LogitShards
from pkt.methods.targeting.task import DTYPES, Config, Task
from pkt.output import MANIFEST, as_json, publish, run_folder
from pkt.records import Reading, Recording
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import Spool, Sweep, build_skeleton
from pkt.targets import FOLDER
from pkt.workplace import tensor_folder

__all__ = ["Config", "Task", "run"]

Notify = Callable[[str, int, int], None]


def run(
    task: Task,
    folder: Path,
    *,
    io: Reading,
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Recording:
    """Write the targets; the same call continues a run that was interrupted.

    Args:
        task: opened inputs and options.
        folder: OUT.
        io: mmap, buffered or direct, and why.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        notify: told of (phase, steps done, steps in all).

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    config, place = task.config, torch.device(device)
    dtype, costs, peak = DTYPES[config.dtype], Costs(), PeakMeter()
    weights = task.teacher.checkpoint.state()
    identity = {**task.identity(), "device": place.type, "weights": weights}
    with (
        peak.running(),
        one_thread(task.teacher.small),
        run_folder(folder, identity, overwrite) as work,
    ):
        records, staged = work / "spool", work / "result"
        for needed in (records, staged, staged / FOLDER):
            needed.mkdir(exist_ok=True)
        spool = Spool(
            records,
            [len(sample.tokens) for sample in task.samples.samples],
            task.teacher.hidden_size,
            dtype,
            tensor_folder(records, task.spool_dir),
        )
        with costs.phase("skeleton"):
            skeleton = build_skeleton(task.teacher.folder, dtype, place)
        source = CheckpointSource(task.teacher.checkpoint, io.mode, task.plan.slots, dtype, place)
        try:
            logits = LogitShards(task, staged / FOLDER, spool)
            sweep = _sweep(task, skeleton, source, spool, notify, costs)
            # 1. Every example through every layer; 2. from the last hidden states, the logits.
            if not logits.finished:
                sweep.forward({task.teacher.layers: lambda: logits.write(sweep)})
        finally:
            source.close()
        found = {**task.identity(), **logits.close()}
        record = _cost(task, source, io, costs, peak)
        publish(folder, staged, {"pkt_run.json": as_json(record), MANIFEST: as_json(found)})
    return Recording(folder, found, record)


def _sweep(
    task: Task,
    skeleton: Any,
    source: CheckpointSource,
    spool: Spool,
    notify: Notify,
    costs: Costs,
) -> Sweep:
    row_bytes = task.teacher.embedding.bytes // task.teacher.embedding.shape[0]
    return Sweep(
        skeleton=skeleton,
        checkpoint=task.teacher.checkpoint,
        seeds=task.samples.samples,
        spool=spool,
        source=source,
        device=source.device,
        whole_layer=True,
        batched=True,
        chunk_rows=max(1, (source.slot_bytes - PAGE) // row_bytes),
        notify=notify,
        seconds=costs.seconds,
    )


def _cost(
    task: Task, source: CheckpointSource, reading: Reading, costs: Costs, peak: PeakMeter
) -> dict[str, Any]:
    """`pkt_run.json`: what this process did and what it cost."""
    counts = source.counts()
    seconds = counts.get("read_seconds", 0.0)
    return {
        "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
        "bytes_read": counts["bytes"] + counts["bytes_out_of_turn"],
        "checkpoint_bytes": task.teacher.checkpoint.bytes,
        "gigabytes_per_second": round(counts["bytes"] / seconds / 1e9, 3) if seconds else None,
        "stalls": counts.get("stalls", 0),
        "stall_seconds": round(counts.get("stall_seconds", 0.0), 3),
        "peak_anonymous_bytes": peak.peak_bytes,
        "planned_bytes": task.plan.peak_bytes,
        "budget_bytes": task.plan.budget_bytes,
        "io": source.mode,
        "io_reason": reading.reason,
        "notices": source.notices,
        "slots": task.plan.slots,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "host": describe(),
    }
