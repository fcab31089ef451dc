"""Maps that each layer pair has of its own, fitted on activations of both models.

Teacher and student are streamed once each over the first examples; of every layer that a pair needs
some positions are kept, and one pair after another is fitted on them, in float64. A finished map is
a durable step: it lies beside the run with the hashes of what it was made from.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pkt.errors import OutputError
from pkt.host import release_free_memory
from pkt.methods.targeting.places import Place, Read, first_places, of_student, of_teacher
from pkt.methods.targeting.sweeps import Notify, Sweeps
from pkt.methods.targeting.task import SUB_LAYERS, Carry, Task
from pkt.output import as_json
from pkt.pairing import all_sources, sources
from pkt.records import LayerPair
from pkt.semantics import MAPS, Evidence, load_map, save_map
from pkt.sweep import DamagedError, RowsTap, Spool, Sweep, boundary, kept_rows
from pkt.workplace import drop_tensors

STATES = 4096  # positions that a map is fitted on, at most
MOST_REMADE = 3  # times that kept rows are made again

Terms = Mapping[int, float]


def map_file(task: Task, student_layer: int) -> str:
    """The name of the map that a student layer is given states by."""
    assert task.states
    one = "" if not task.states.fitted_on else f"-{student_layer:05d}"
    return f"{task.states.map}{one}.safetensors"


def _student_terms(task: Task, pairs: Sequence[LayerPair]) -> list[dict[int, float]]:
    """What the student's own states are the sum of: of a span it is what the layer does."""
    assert task.states
    interface = "block" if task.states.interface == "span" else task.states.interface
    return [sources(LayerPair(pair.student, pair.student), interface) for pair in pairs]


def fitted(
    task: Task,
    work: Path,
    teacher: Sweeps,
    student: Callable[[], Sweeps],
    pairs: Sequence[LayerPair],
    channels: Sequence[Sequence[float]],
) -> tuple[Carry, dict[str, Any]]:
    """Fit the map of each pair, or take what was found before.

    Args:
        task: opened inputs and options.
        work: OUT/.work, whose folder ``maps`` holds maps made earlier.
        teacher: its sweeps.
        student: opens the student's.
        pairs: of layers.
        channels: of each teacher layer the attribution of its channels, where the map needs it.

    Returns:
        the map of a student layer, read when it is asked for; and what a manifest says of the fit:
        ``examples``, ``positions``, and of each pair ``left``, ‖X_S − X_T Mᵀ‖ / ‖X_S‖.

    """
    states = task.states
    assert states
    folder, records = work / "maps", work / "fit"
    places = first_places(task, states.fitted_on, STATES)
    read = of_teacher(task, places), of_student(task, places)
    assert task.student
    depths = task.teacher.layers, task.student.layers
    terms = all_sources(pairs, states.interface, *depths), _student_terms(task, pairs)
    inputs = [_inputs(task, places, *each) for each in zip(pairs, *terms, strict=True)]
    paths = [folder / map_file(task, pair.student) for pair in pairs]
    left = [_left(path, given) for path, given in zip(paths, inputs, strict=True)]
    if missing := [number for number, found in enumerate(left) if found is None]:
        records.mkdir(exist_ok=True)
        named, notify = partial(_named, teacher.notify), teacher.notify
        theirs = _Kept(task, teacher, read[0], terms[0], records / "teacher", named("teacher"))
        theirs.collect()
        teacher.release()
        opened = student()
        ours = _Kept(task, opened, read[1], terms[1], records / "student", named("student"))
        try:
            ours.collect()
            with teacher.costs.phase("fit"):
                for number in missing:
                    both = theirs.states(number), ours.states(number)
                    made, left[number] = _fit(task, both, pairs[number], channels)
                    save_map(paths[number], made, inputs[number], {"left": left[number]})
                    notify("maps", number + 1, len(pairs))
        finally:
            opened.release()
        drop_tensors(records)
        shutil.rmtree(records)
    release_free_memory()
    told = {
        "examples": len(read[0].texts),
        "positions": len(places),
        "left": left,
    }
    numbers = {pair.student: number for number, pair in enumerate(pairs)}

    def carry(layer: int) -> torch.Tensor:
        path = paths[numbers[layer]]
        found = load_map(path, inputs[numbers[layer]])
        if found is None:
            raise OutputError(f"{path}: this map was changed while it was in use", "start again")
        return found[0]

    return carry, {"fitted": told}


def _left(path: Path, inputs: Mapping[str, Any]) -> float | None:
    """What a map that was made of these inputs leaves; ``None``: it is not there."""
    found = load_map(path, inputs)
    return None if found is None else float(found[1]["left"])


def _fit(
    task: Task,
    both: tuple[torch.Tensor, torch.Tensor],
    pair: LayerPair,
    channels: Sequence[Sequence[float]],
) -> tuple[torch.Tensor, float]:
    """M (D_S, D_T) float32 of one pair, and what it leaves of the student's states."""
    assert task.states
    chosen = None
    if task.states.needs_channels:
        rows = [torch.tensor(channels[at - 1], dtype=torch.float64) for at in _layers(pair)]
        chosen = torch.lerp(rows[0], rows[-1], pair.mix)
    theirs, ours = both
    sizes = theirs.shape[1], ours.shape[1]
    made = MAPS[task.states.map].make(Evidence(sizes, states=both, channels=chosen)).float()
    wide = ours.double()
    left = wide - theirs.double() @ made.double().T
    return made, float(left.norm() / wide.norm().clamp_min(1e-300))


def _layers(pair: LayerPair) -> list[int]:
    return [pair.teacher, pair.teacher + 1] if pair.mix else [pair.teacher]


def _inputs(
    task: Task, places: Sequence[Place], pair: LayerPair, theirs: Terms, ours: Terms
) -> dict[str, Any]:
    """What the map of a pair depends on; weights are told apart by their files' times."""
    assert task.states
    assert task.student
    where = as_json([astuple(place) for place in places])
    texts = task.aligned.texts.sha256 if task.aligned else task.samples.sha256
    given: dict[str, Any] = {
        "format": 1,
        "map": task.states.map,
        "teacher": task.teacher.hashes(),
        "student": task.student.hashes(),
        "texts": [texts, task.samples.sha256],
        "places": hashlib.sha256(where.encode()).hexdigest(),
        "interface": task.states.interface,
        "dtype": task.config.dtype,
        "terms": [sorted(theirs.items()), sorted(ours.items())],
    }
    if task.states.needs_channels and task.states.attributing:
        wanted = task.states.attributing
        given["attribution"] = [wanted.examples, wanted.absolute, _layers(pair), pair.mix]
    return given


class _Kept:
    """Activations of one model at some positions of its texts, on the disk.

    Args:
        task: options.
        sweeps: of the model.
        read: texts and positions.
        terms: of each pair, what its state is the sum of.
        folder: of the spool.
        notify: told of (phase, steps done, steps in all).

    """

    def __init__(
        self,
        task: Task,
        sweeps: Sweeps,
        read: Read,
        terms: Sequence[Terms],
        folder: Path,
        notify: Notify,
    ) -> None:
        assert task.states
        self._which: Any = task.states.interface
        self._taps = task.states.interface in SUB_LAYERS
        self._sweeps, self._read, self._terms, self._notify = sweeps, read, terms, notify
        self._sources = {source for each in terms for source in each}
        folder.mkdir(exist_ok=True)
        self._spool = sweeps.spool(folder, read.texts)
        self._rows = Spool(
            folder, read.lengths, self._spool.width, self._spool.dtype, self._spool.tensors
        )

    def collect(self) -> None:
        """One pass forward, from wherever the spool stands, up to the last layer that is needed."""
        missing = {source for source in self._sources if not self._rows.holds(kept_rows(source))}
        if not missing:
            return
        sweep = self._sweeps.sweep(self._read.texts, self._spool, self._notify)
        if self._taps:
            sweep.tap = RowsTap(
                sweep.skeleton, self._which, missing, self._read.positions, self._rows
            )
            missing |= {source - 1 for source in missing}
        sweep.forward({index: partial(self._keep, index, sweep) for index in missing})

    def states(self, number: int) -> torch.Tensor:
        """The states (n, D) float32 of one pair; what is found damaged is made again."""
        for again in range(MOST_REMADE + 1):
            try:
                return self._states(number)
            except DamagedError as damage:
                if again == MOST_REMADE:
                    raise
                self._rows.drop(damage.name)
                self.collect()
        raise AssertionError("unreachable")

    def _states(self, number: int) -> torch.Tensor:
        parts = []
        for text in range(len(self._read.texts)):
            rows = [
                factor * self._rows.read(kept_rows(source), text).float()
                for source, factor in self._terms[number].items()
            ]
            parts.append(torch.stack(rows).sum(0))
        return torch.cat(parts).to(self._sweeps.source.device)

    def _keep(self, index: int, sweep: Sweep) -> None:
        if self._taps or self._rows.holds(kept_rows(index)):
            return
        with self._rows.writer(kept_rows(index)) as out:
            for number, positions in enumerate(self._read.positions):
                out.append(sweep.spool.read(boundary(index), number)[positions])


def _named(notify: Notify, role: str) -> Notify:
    return lambda phase, done, total: notify(role, done, total)
