"""Which teacher layers the answers hang on, and the pairs that follow from it.

Made once: the result lies beside the run, with the hashes of what it depends on, and is used again
by a run of the same inputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt.durable import durable
from pkt.methods.targeting.task import Task
from pkt.output import as_json
from pkt.pairing import attributed_pairs, critical_pairs, highest_layers, interpolated_pairs
from pkt.records import LayerPair, Sample
from pkt.samples import sample_set
from pkt.sweep import AttributionSweep
from pkt.workplace import drop_tensors

RESULT = "attribution.json"


def chosen_pairs(task: Task, scores: Sequence[float]) -> tuple[LayerPair, ...]:
    """The pairs that attribution leads to."""
    assert task.states
    assert task.student
    depths = task.teacher.layers, task.student.layers
    if not task.states.critical:
        return attributed_pairs(scores, *depths)
    pairs = critical_pairs(highest_layers(scores, task.states.critical), *depths)
    if task.states.interpolate:
        every = interpolated_pairs(*depths)
        return tuple(every[pair.student - 1] for pair in pairs)
    return pairs


def attribution_inputs(task: Task) -> dict[str, Any]:
    """What an attribution depends on, by hashes; weights are told apart by their files' times."""
    assert task.states
    assert task.states.attributing
    wanted = task.states.attributing
    texts = task.texts[: wanted.examples]
    channels = {"channels": True} if task.states.needs_channels else {}
    return {
        "format": 1,
        "teacher": task.teacher.hashes(),
        "texts": sample_set(texts, task.samples.template).sha256,
        "of": task.states.interface if task.states.interface in ("mlp", "attn") else "block",
        "absolute": wanted.absolute,
        "dtype": task.config.dtype,
        **channels,
    }


def attributed(
    task: Task,
    work: Path,
    make_sweep: Callable[[Sequence[Sample], Path], AttributionSweep],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Attribute, or take what was found before.

    Args:
        task: opened inputs and options.
        work: OUT/.work.
        make_sweep: a sweep of given texts whose spool lies in a given folder.
        earlier: what lay in OUT, of the same weights.

    Returns:
        JSON: ``scores``, A of each layer; ``loss``, the mean over texts; ``inputs``; where the map
        needs them, ``channels``, of each layer those of its channels.

    """
    assert task.states
    assert task.states.attributing
    inputs = attribution_inputs(task)
    for held in (_read(work / RESULT), earlier):
        if held and held.get("inputs") == inputs:
            return dict(held)
    texts = task.texts[: task.states.attributing.examples]
    records = work / "attribution"
    records.mkdir(exist_ok=True)
    sweep = make_sweep(texts, records)
    made = sweep.attribute(
        inputs["of"], absolute=inputs["absolute"], channels=task.states.needs_channels
    )
    losses = sweep.spool.get("losses") or []
    found = {
        "inputs": inputs,
        "examples": len(texts),
        "loss": sum(losses) / len(losses),
        "scores": made.layers,
    }
    if made.channels:
        found["channels"] = made.channels
    with durable(work / RESULT) as file:
        file.write(as_json(found).encode())
    drop_tensors(records)
    shutil.rmtree(records)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
