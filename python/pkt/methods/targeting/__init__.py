"""What a teacher says and thinks of the training data, written as it is streamed.

A student then learns from a teacher that never was in memory: from its k largest logits at each
answer token and the sum over all of them, and from its activations, mapped to the student's width
(`pkt.targets`). Every example goes through layer i before any meets layer i + 1, as in an
extraction, so the teacher is read once, whatever the number of examples; only the hidden states
before and behind the layer in use are on the disk, and of earlier ones the rows still needed. Where
the layers are chosen by attribution it is read twice more, for a few examples, and once more where
a map is fitted on its activations.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pkt.durable import durable
from pkt.host import Costs, PeakMeter, describe, one_thread
from pkt.methods.targeting.attribution import RESULT, attributed, chosen_pairs
from pkt.methods.targeting.fitting import fitted, map_file
from pkt.methods.targeting.kernels import LayerKernels
from pkt.methods.targeting.online import LiveTargets
from pkt.methods.targeting.shards import LogitShards
from pkt.methods.targeting.states import StateShards
from pkt.methods.targeting.sweeps import Sweeps, pass_once
from pkt.methods.targeting.task import Aligned, Attributing, Carry, Config, States, Task
from pkt.models import Model
from pkt.output import MANIFEST, as_json, publish, run_folder
from pkt.pairing import unlike_attention
from pkt.records import LayerPair, Reading, Recording
from pkt.semantics import save_map
from pkt.stream import CheckpointSource
from pkt.targets import FOLDER, INDEX, index_text

__all__ = [
    "Aligned",
    "Attributing",
    "Config",
    "LiveTargets",
    "States",
    "Task",
    "hold",
    "pair_rows",
    "run",
]

MAPS = "maps"  # folder of M, in OUT

Notify = Callable[[str, int, int], None]
MakeMap = Callable[[Path], tuple[torch.Tensor, dict[str, Any]]]


def run(
    task: Task,
    folder: Path,
    *,
    io: Reading,
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    make_map: MakeMap | None = None,
    paired: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> Recording:
    """Write the targets; the same call continues a run that was interrupted.

    Args:
        task: opened inputs and options.
        folder: OUT.
        io: mmap, buffered or direct, and why.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        notify: told of (phase, steps done, steps in all).
        make_map: M (D_S, D_T) float32 of the pair, and what was found of both heads, JSON; maps
            that lie in the folder it is given are used again. Needed where states are wanted.
        paired: told of the pairs (`pair_rows`) where they follow from attribution.

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    place = torch.device(device)
    costs, peak = Costs(), PeakMeter()
    weights = _weights(task)
    identity = {**task.identity(), "device": place.type, "weights": weights}
    earlier: dict[str, Any] | None = None
    maps: dict[str, bytes] = {}
    if task.states:
        earlier, maps = _earlier(folder, weights, fitting=task.states.fitted_on > 0)
    with (
        peak.running(),
        one_thread(task.teacher.small),
        run_folder(folder, identity, overwrite) as work,
    ):
        records, staged = work / "spool", work / "result"
        for needed in (records, staged, staged / FOLDER):
            needed.mkdir(exist_ok=True)
        opened = partial(Sweeps, task, io=io.mode, device=place, notify=notify, costs=costs)
        about = opened(task.teacher)
        source = about.source
        try:
            found: dict[str, Any] = {}
            states: StateShards | None = None
            spool = about.spool(records, task.texts)
            if task.states:
                # 1. The layers that the answers hang on, and the pairs; 2. the map between them.
                pairs, found = _pairs(task, work, about, earlier)
                if task.states.pairs is None:
                    paired(pair_rows(task, pairs))
                _held_maps(work, maps)
                carry, heads = _carry(task, work, opened, about, pairs, found, make_map)
                found |= heads
                states = StateShards(task, pairs, carry, staged / FOLDER, spool)
            logits = LogitShards(task, staged / FOLDER, spool)
            # 3. Every example through every layer, whose states are mapped as it is passed;
            # 4. from the last hidden states, the logits.
            kernels = LayerKernels(task, staged / FOLDER, spool) if task.states else None
            pass_once(about.sweep(task.texts, spool), logits, states, kernels)
        finally:
            source.close()
        _write_index(task, staged / FOLDER / INDEX, logits, states, kernels)
        found = {**task.identity(), **logits.means(), **_told(task, found, states)}
        if states:
            _stage(task, states.index.pairs, work, staged, found)
        record = {**_cost(task, source, io, costs, peak), "weights": weights}
        publish(folder, staged, {"pkt_run.json": as_json(record), MANIFEST: as_json(found)})
    return Recording(folder, found, record)


def hold(
    task: Task,
    work: Path,
    *,
    logits: bool,
    io: Reading,
    device: torch.device,
    notify: Notify = lambda phase, done, total: None,
    make_map: MakeMap | None = None,
    paired: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[LiveTargets, dict[str, Any]]:
    """The targets without writing them: the whole teacher is read into memory and stays there.

    Attribution, where pairs follow from it, streams the teacher before; its result and the map stay
    in ``work`` for a run that is continued.

    Args:
        task: opened inputs and options.
        work: OUT/.work of the run that learns, which is locked.
        logits: whether they are learnt from.
        io: mmap, buffered or direct, and why.
        device: where the teacher is held.
        notify: as of `run`.
        make_map: as of `run`.
        paired: as of `run`.

    Returns:
        the targets, and what a manifest says of pairs and heads.

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    opened = partial(Sweeps, task, io=io.mode, device=device, notify=notify, costs=Costs())
    about = opened(task.teacher)
    try:
        pairs: Sequence[LayerPair] = ()
        carry: Carry | None = None
        found: dict[str, Any] = {}
        if task.states:
            pairs, found = _pairs(task, work, about, None)
            if task.states.pairs is None:
                paired(pair_rows(task, pairs))
            _held_maps(work, {})
            carry, heads = _carry(task, work, opened, about, pairs, found, make_map)
            found |= {"pairs": pair_rows(task, pairs), **heads}
        about.release()
        held = about.resident(work / "spool")
        return LiveTargets(task, held, pairs, carry, logits=logits), found
    finally:
        about.source.close()


def pair_rows(task: Task, pairs: Sequence[LayerPair]) -> list[dict[str, Any]]:
    """Each pair with the attention of both layers, JSON."""
    theirs, ours = task.kinds
    unlike = set(unlike_attention(pairs, theirs, ours))
    return [
        {
            "teacher": pair.teacher,
            "student": pair.student,
            "mix": pair.mix,
            "teacher_attention": theirs[pair.teacher - 1],
            "student_attention": ours[pair.student - 1],
            "unlike": pair in unlike,
        }
        for pair in pairs
    ]


def _pairs(
    task: Task, work: Path, sweeps: Sweeps, earlier: Mapping[str, Any] | None
) -> tuple[Sequence[LayerPair], dict[str, Any]]:
    """The pairs, and what a manifest says of how they were found."""
    assert task.states
    if not task.states.attributing:
        assert task.states.pairs is not None
        return task.states.pairs, {}
    made = attributed(task, work, sweeps.attribution, earlier)
    sweeps.release()
    pairs = task.states.pairs
    if pairs is None:
        pairs = chosen_pairs(task, made["scores"])
    kept = {name: made[name] for name in ("examples", "loss", "scores", "channels") if name in made}
    with durable(work / RESULT) as file:
        file.write(as_json(made).encode())
    return pairs, {"attribution": kept}


def _held_maps(work: Path, held: dict[str, bytes]) -> None:
    """Lay maps of an earlier run where those of this one will lie."""
    folder = work / MAPS
    folder.mkdir(exist_ok=True)
    for name, data in held.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(data)
    held.clear()


def _carry(
    task: Task,
    work: Path,
    opened: Callable[[Model], Sweeps],
    teacher: Sweeps,
    pairs: Sequence[LayerPair],
    found: dict[str, Any],
    make_map: MakeMap | None,
) -> tuple[Carry, dict[str, Any]]:
    """The map of each student layer; of ``found`` the attribution of channels is taken out."""
    assert task.states
    assert task.student
    channels = found.get("attribution", {}).pop("channels", [])
    if not task.states.fitted_on:
        return _map(task, work, make_map, teacher.costs)
    return fitted(task, work, teacher, partial(opened, task.student), pairs, channels)


def _map(
    task: Task, work: Path, make_map: MakeMap | None, costs: Costs
) -> tuple[Carry, dict[str, Any]]:
    """M, made or taken from an earlier run, and what is to be known of the heads."""
    assert make_map, "states are mapped"
    assert task.states
    folder = work / MAPS
    with costs.phase("map"):
        matrix, heads = make_map(folder)
    path = folder / map_file(task, 0)
    if not path.exists():  # it needs no head
        save_map(path, matrix, {"map": task.states.map, "seed": task.states.seed}, {})
    return lambda layer: matrix, {"heads": heads} if heads else {}


def _told(task: Task, found: Mapping[str, Any], states: StateShards | None) -> dict[str, Any]:
    """What the manifest says of the states."""
    if states is None:
        return {}
    rows = sum(states.index.rows(task.answers))
    told: dict[str, Any] = {
        "pairs": pair_rows(task, states.index.pairs),
        "rows": rows,
        "width": states.index.width,
        "rounding": states.rounding,
        **found,
    }
    if task.shared and not task.shared.same:
        told["coverage"] = {
            "tokens": task.shared.coverage,
            "answer_tokens": rows / sum(task.answers),
        }
    files = [MAPS, *([RESULT] if "attribution" in found else [])]
    return {**told, "files": files}


def _write_index(
    task: Task,
    path: Path,
    logits: LogitShards,
    states: StateShards | None,
    kernels: LayerKernels | None,
) -> None:
    shards = list(zip(task.shards, logits.digests(), strict=True))
    text = index_text(
        shards, task.answers, task.config.top_k,
        states.index if states else None, states.files() if states else (),
        kernels.index() if kernels else None,
    )  # fmt: skip
    with durable(path) as file:
        file.write(text.encode())


def _stage(
    task: Task, pairs: Sequence[LayerPair], work: Path, staged: Path, found: Mapping[str, Any]
) -> None:
    """Maps, attribution and report, where results are published from."""
    (staged / MAPS).mkdir(exist_ok=True)
    for name in {map_file(task, pair.student) for pair in pairs}:
        shutil.copyfile(work / MAPS / name, staged / MAPS / name)
    if "attribution" in found:
        from pkt.report import write_attribution  # matplotlib is loaded from here on

        write_attribution(staged / "report", found)
        shutil.copyfile(work / RESULT, staged / RESULT)


def _weights(task: Task) -> dict[str, int]:
    """When the weights that the result depends on were last written to."""
    found = dict(task.teacher.checkpoint.state())
    if task.states and task.states.fitted_on and task.student:
        state = task.student.checkpoint.state()
        found |= {f"student: {name}": at for name, at in state.items()}
    return found


def _earlier(
    folder: Path, weights: Mapping[str, int], *, fitting: bool
) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """What a finished run left in OUT that may hold of this one too: attribution, maps.

    What depends on more weights than the heads' is none of this run's unless all are as they were.
    """
    same = False
    try:
        run = json.loads((folder / "pkt_run.json").read_text(encoding="utf-8"))
        same = run.get("weights") == dict(weights)
        made = json.loads((folder / RESULT).read_text(encoding="utf-8")) if same else None
    except (OSError, ValueError, AttributeError):
        made = None
    maps = {}
    for path in sorted((folder / MAPS).glob("*.safetensors")):
        if fitting and not same:
            continue
        try:
            maps[path.name] = path.read_bytes()
        except OSError:
            continue
    return made if isinstance(made, dict) else None, maps


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
