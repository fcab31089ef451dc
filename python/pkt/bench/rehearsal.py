"""Two layers of the teacher's shape, swept by the method itself: what a layer takes on this host.

The weights are random and in memory, so the disk has no part in it and headers are enough. Of
many seeds a few are taken, spread over their lengths; the times are then in proportion to tokens.
The first layer warms up, the second is what counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pkt.api.fitting import kept_records
from pkt.checkpoint import DTYPE_BYTES, Piece
from pkt.cutting import Indices, cut_weights, cut_window, stack_parts
from pkt.disk import Stretch, drop_cached, on_disk
from pkt.factorization import factorize
from pkt.methods.seeking.steps import score
from pkt.methods.seeking.task import DTYPES, Task
from pkt.models import Model
from pkt.projections import Pair, physical_rows
from pkt.records import IoMode, Sample, Window
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import build_skeleton

LAYERS = 2
SAMPLE_TOKENS = 1024  # of the seeds that are swept; at least one seed
POOL = (1 << 22) + 3  # random numbers that weights are made of: odd, so that rows differ
DEVIATION = 0.02

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds for all seeds of the run, of one layer where not said otherwise."""

    forward: float
    backward: float
    head: float
    ends: float
    sampled_tokens: int  #: that were really swept


@dataclass(frozen=True, slots=True)
class FactorTimes:
    """All factorizations of the run, and how fast the windows came from the disk for them."""

    seconds: float
    window_bytes: int  #: that were read to measure; 0 where the files hold none of them
    window_seconds: float


class RandomWeights:
    """In place of a `CheckpointSource`: tensors of the shapes asked for, from memory.

    They are views of as much memory as the run would have in one slot: those of a layer lie side by
    side, what else is asked for (runs of embedding rows, the head) begins where they do; a
    larger head is made when it is asked for, as the run reads it then.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.device = torch.device("cpu")
        layer = model.checkpoint.layers[0]
        self.slot_bytes = model.checkpoint.layer_bytes + PAGE
        rows = -(-self.slot_bytes // dtype.itemsize)
        generator = torch.Generator().manual_seed(0)
        self._pool = (torch.randn(POOL, generator=generator) * DEVIATION).to(dtype)
        elements = sum(piece.elements for piece in layer.values())
        self._memory = self._made(max(elements, rows))  # before anything is timed
        self._places: dict[str, int] = {}
        place = 0
        for name, piece in layer.items():
            self._places[name] = place
            place += piece.elements

    def jobs(
        self, labels: Sequence[tuple[str, dict[str, Piece]]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The same tensors for every layer."""
        return (self.read(pieces) for _, pieces in labels)

    def read(self, pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        """Tensors of the shapes of ``pieces``, by their names."""
        return {name: self._tensor(name, piece) for name, piece in pieces.items()}

    def close(self) -> None:
        """Nothing is open."""

    def _tensor(self, name: str, piece: Piece) -> torch.Tensor:
        if len(piece.shape) < 2:
            return torch.ones(piece.shape, dtype=self._memory.dtype)
        if piece.elements > len(self._memory):
            return self._made(piece.elements).view(piece.shape)
        place = self._places.get(name, 0)
        return self._memory[place : place + piece.elements].view(piece.shape)

    def _made(self, elements: int) -> torch.Tensor:
        memory = torch.empty(elements, dtype=self._pool.dtype)
        for part in memory.split(POOL):
            part.copy_(self._pool[: len(part)])
        return memory


def rehearse(task: Task, folder: Path, notify: Notify) -> LayerTimes:
    """Sweep two layers of the teacher's shape in ``folder``.

    Args:
        task: the run that is forecast; its plan says how scores are held.
        folder: empty; the sweep's files go there.
        notify: told of (phase, steps done, steps in all).

    """
    sample = sampled(task.seeds.samples)
    seeds = replace(task.seeds, samples=tuple(sample))
    plan = replace(task.plan, room=None, spool_every=1)
    teacher = first_layers(task.teacher, folder / "model")
    short = replace(task, seeds=seeds, teacher=teacher, plan=plan)
    dtype = DTYPES[task.config.dtype]
    skeleton = build_skeleton(short.teacher.folder, dtype)
    source: Any = RandomWeights(short.teacher, dtype)
    work, seconds, ended = folder / "work", dict[str, float](), dict[str, list[float]]()
    work.mkdir()

    def note(phase: str, done: int, total: int) -> None:
        ended.setdefault(phase, []).append(time.perf_counter())
        notify(phase, done, total)

    score(short, skeleton, source, work, note, seconds)
    tokens = task.seeds.tokens / seeds.tokens
    return LayerTimes(
        forward=_last(ended["forward"], seconds["forward"]) * tokens,
        backward=_last(ended["backward"], seconds["backward"]) * tokens,
        head=seconds["head"] * task.seeds.loss_tokens / seeds.loss_tokens,
        ends=seconds.get("ends", 0.0) * tokens,
        sampled_tokens=seeds.tokens,
    )


def sampled(samples: Sequence[Sample], tokens: int = SAMPLE_TOKENS) -> list[Sample]:
    """A few samples, spread evenly over the lengths: the fewest that have ``tokens`` tokens.

    All of them where they have fewer; one where each has more.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.tokens))
    for count in range(1, len(ordered)):
        chosen = [ordered[(2 * at + 1) * len(ordered) // (2 * count)] for at in range(count)]
        if sum(len(sample.tokens) for sample in chosen) >= tokens:
            return chosen
    return ordered


def first_layers(model: Model, folder: Path, count: int = LAYERS) -> Model:
    """The model as if it had ``count`` layers: configuration in ``folder``, and pieces."""
    depth = model.layers
    count = min(count, depth)

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, list) and len(value) == depth else value

    config = {key: cut(value) for key, value in model.config.items()}
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in config:
            config[key] = count
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = replace(model.checkpoint, layers=model.checkpoint.layers[:count])
    return replace(model, folder=folder, config=config, checkpoint=checkpoint)


def rehearse_factors(task: Task, mode: IoMode, notify: Notify) -> FactorTimes:
    """Read and factorize one window of each shape; windows of holes are random instead.

    Random weights take longest: their singular values fall off slowest.
    """
    dtype = DTYPES[task.config.dtype]
    source = CheckpointSource(task.teacher.checkpoint, mode, 1, dtype, torch.device("cpu"))
    modules: dict[str, list[Pair]] = {}
    for pair in task.pairs:
        modules.setdefault(pair.student.module, []).append(pair)
    seen: dict[tuple[int, ...], float] = {}
    factors, read, reading = 0.0, 0, 0.0
    try:
        for done, (module, pairs) in enumerate(modules.items()):
            shape = task.student.checkpoint.layers[0][f"{module}.weight"].shape
            if shape not in seen:
                start = time.perf_counter()
                weight = _stored(task, source, pairs, shape[0])
                if weight is not None:
                    read += sum(_read_bytes(task, pair) for pair in pairs)
                    reading += time.perf_counter() - start
                else:
                    weight = torch.randn(shape) * DEVIATION
                start = time.perf_counter()
                factorize(weight, task.config.rank, task.config.split)
                seen[shape] = time.perf_counter() - start
            factors += seen[shape]
            notify("factors", done + 1, len(modules))
    finally:
        source.close()
    ends = 0.0
    if task.config.embeddings:  # the head's are as large
        weight = torch.randn(task.student.embedding.shape) * DEVIATION
        start = time.perf_counter()
        factorize(weight, task.config.rank, task.config.split)
        ends = 2 * (time.perf_counter() - start)
        notify("factors", len(modules), len(modules))
    return FactorTimes(factors * task.student.layers + ends, read, reading)


def _stored(
    task: Task, source: CheckpointSource, pairs: Sequence[Pair], height: int
) -> torch.Tensor | None:
    """A module's first window in the first layer that is no hole, from the disk; or ``None``."""
    checkpoint = task.teacher.checkpoint
    there = on_disk(checkpoint)
    if not any(there):
        return None
    layer = checkpoint.layers[there.index(True)]
    placed = []
    for pair in pairs:
        piece = layer[f"{pair.teacher.module}.weight"]
        drop_cached(checkpoint.files, Stretch(piece.shard, piece.begin, piece.end))
        shape = pair.student.out_features, pair.student.in_features
        rows = physical_rows(pair.teacher, task.teacher.head_dim, pair.kv_repeat)
        if kept_records(task.config.select)["masks"]:
            chosen = _spread(shape[0] * shape[1], pair.teacher_rows * pair.teacher.in_features)
            weight = cut_weights(source.window, piece, chosen, rows, shape)
        else:
            window = Window(pair.key, 0.0, (0, shape[0]), (0, shape[1]))
            weight = cut_window(source.window, piece, window, rows)
        placed.append((weight, physical_rows(pair.student, task.student.head_dim, 1)))
    return stack_parts(placed, height)


def _read_bytes(task: Task, pair: Pair) -> int:
    """Of the teacher's matrix, to cut the first window of ``pair``: its rows, or all weights."""
    piece = task.teacher.checkpoint.layers[0][f"{pair.teacher.module}.weight"]
    masks = kept_records(task.config.select)["masks"]
    return pair.read_elements(crossed=False, masks=masks) * DTYPE_BYTES[piece.dtype]


def _spread(count: int, elements: int) -> Indices:
    """``count`` indices of ``elements``, as far apart as they can be, as `cut_weights` asks."""

    def chosen(start: int, stop: int) -> torch.Tensor:
        first, last = (-(-at * count // elements) for at in (start, stop))
        return torch.arange(first, last) * elements // count - start

    return chosen


def _last(moments: Sequence[float], whole: float) -> float:
    """Seconds of the last layer; ``whole``, those of the pass, where it is the only one."""
    return moments[-1] - moments[-2] if len(moments) > 1 else whole
