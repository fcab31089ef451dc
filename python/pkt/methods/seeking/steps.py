"""The steps of the method, each wiring a few stages: scores, then windows and their factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pkt.consistent import Subnetwork, channel_window, choose_subnetwork, subnetwork_window
from pkt.cutting import cut_weights, cut_window, stack_parts
from pkt.errors import IncompatibleError
from pkt.factorization import factorize, orthogonal_factors
from pkt.heads import heads_of, split_heads
from pkt.host import release_free_memory
from pkt.methods.seeking.task import DTYPES, Config, Task
from pkt.processes import balanced_share, is_first, sum_in_place, sum_over_processes
from pkt.projections import Pair, physical_rows
from pkt.records import Factors, Heat, Window
from pkt.selection import (
    Cut,
    Ranking,
    choose_columns,
    mask_indices,
    mask_name,
    mask_sha256,
    mix_seed,
    recorded_heat,
    recorded_sums,
    recorded_window,
)
from pkt.sensitivity import LayerScores, accumulate_columns
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import Skeleton, Spool, Sweep
from pkt.workplace import tensor_folder

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scores:
    """What the sweep leaves: losses by seed, a record a layer, column scores of the ends."""

    losses: list[float]
    records: list[dict[str, Any]]
    ends: dict[str, list[float]]

    @property
    def layers(self) -> list[float]:
        """The score of each teacher layer."""
        return [float(record["score"]) for record in self.records]


@dataclass
class Start:
    """The windows that were chosen and the factors made of them, by student module."""

    windows: dict[str, Window] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    heats: dict[str, Heat] = field(default_factory=dict)
    network: Subnetwork | None = None  #: under ``consistent``


def require_linear(task: Task, teacher: Skeleton, student: Skeleton) -> None:
    """Refuse models that keep a wanted projection in anything but an nn.Linear.

    Raises:
        IncompatibleError: names family and module; nothing has been read yet.

    """
    wanted = [(teacher, pair.teacher.module) for pair in task.pairs]
    wanted += [(student, pair.student.module) for pair in task.pairs]
    for skeleton, module in wanted:
        if module not in skeleton.linears(0):
            raise IncompatibleError(
                f"model family '{skeleton.family}': its {module} is no nn.Linear",
                "pkt cuts windows from linear layers stored as (out, in)",
            )


def score(
    task: Task,
    skeleton: Skeleton,
    source: CheckpointSource,
    folder: Path,
    notify: Notify,
    seconds: dict[str, float],
) -> Scores:
    """Sweep the teacher; windows are ranked while a layer's scores are in memory.

    Of several processes each sweeps its share of the seeds, and the first ranks the sums.
    """
    config, checkpoint = task.config, task.teacher.checkpoint
    whole = task.plan.scores == "layer"
    ours = balanced_share([len(seed.tokens) for seed in task.seeds.samples])
    seeds = [task.seeds.samples[number] for number in ours]
    elsewhere = task.plan.room.spool_dir if task.plan.room else None
    spool = Spool(
        folder,
        [len(seed.tokens) for seed in seeds],
        task.teacher.hidden_size,
        DTYPES[config.dtype],
        tensor_folder(folder, Path(elsewhere) if elsewhere else None),
    )
    cuts = [
        Cut(
            key=pair.key,
            module=pair.teacher.module,
            teacher=pair.teacher_key,
            shape=(pair.student.out_features, pair.student.in_features),
            rows=physical_rows(pair.teacher, task.teacher.head_dim, pair.kv_repeat),
            share=pair.kv_repeat,
        )
        for pair in task.pairs
    ]
    path = skeleton.layers_path
    ranking = Ranking(cuts, config.select, config.seed, path, spool.put_bytes)

    def intact(record: Mapping[str, Any]) -> bool:
        if config.select == "consistent" or not is_first():
            return True  # its record is all that it needs
        windows = [(cut.key, recorded_window(record, cut.key)) for cut in cuts]
        return all(
            window.mask_sha256 in (None, _mask_digest(folder, record["layer"], key))
            for key, window in windows
        )

    elements = [p.elements for layer in checkpoint.layers for p in layer.values()]
    largest = max(sum(p.elements for p in layer.values()) for layer in checkpoint.layers)
    memory = torch.empty(largest if whole else max(elements), device=source.device)
    if is_first():
        observer = LayerScores(memory, ranking.matrix, ranking.layer, sum_in_place)
    else:
        observer = LayerScores(memory, _no_ranking, _score_alone, sum_in_place)
    row_bytes = task.teacher.embedding.bytes // task.teacher.embedding.shape[0]
    sweep = Sweep(
        skeleton=skeleton,
        checkpoint=checkpoint,
        seeds=seeds,
        spool=spool,
        source=source,
        device=source.device,
        whole_layer=whole,
        chunk_rows=max(1, (source.slot_bytes - PAGE) // row_bytes),
        every=task.plan.spool_every,
        keep_last=config.embeddings,
        notify=notify,
        seconds=seconds,
        intact=intact,
        batched="never" if task.teacher.small else "exact",
    )
    losses, records = sweep.run(observer)
    del observer, memory  # the scores' memory makes room for the head
    source.close()
    ends = sweep.ends(accumulate_columns) if config.embeddings else {}
    source.close()  # it was opened again where a file had been lost
    return _summed(task, ours, Scores(losses, records, ends), source.device)


def _no_ranking(layer: int, module: str, scores: NDArray[np.float32]) -> None:
    pass


def _score_alone(layer: int, score: float) -> dict[str, Any]:
    return {"layer": layer, "score": score}


def _summed(task: Task, ours: Sequence[int], found: Scores, device: torch.device) -> Scores:
    """The losses of all seeds in their order, the ends' sums over all; records are so already."""
    losses = [0.0] * len(task.seeds.samples)
    for number, loss in zip(ours, found.losses, strict=True):
        losses[number] = loss
    ends = {name: sum_over_processes(sums, device) for name, sums in found.ends.items()}
    return Scores(sum_over_processes(losses, device), found.records, ends)


def extract_start(
    task: Task,
    skeleton: Skeleton,
    student: Skeleton,
    source: CheckpointSource,
    scores: Scores,
    layers: Sequence[int],
    folder: Path,
    notify: Notify,
) -> Start:
    """Cut the chosen part of every kept weight out of the files, and factorize it.

    While one is factorized the next is read.
    """
    start = Start()
    if task.config.select == "consistent":
        start.network = _network(task, [scores.records[layer] for layer in layers])
    parts = _parts(task, skeleton, student, source, scores, layers, folder, start)
    for index, name, weight, last in _one_ahead(parts):
        start.factors[name] = _split(task.config, weight.to(source.device), name)
        release_free_memory()
        if last:
            notify("factors", index + 1, len(layers))
    if task.config.embeddings:
        _ends(task, skeleton, student, source, scores.ends, start)
    return start


def _parts(
    task: Task,
    skeleton: Skeleton,
    student: Skeleton,
    source: CheckpointSource,
    scores: Scores,
    layers: Sequence[int],
    folder: Path,
    start: Start,
) -> Iterator[tuple[int, str, torch.Tensor, bool]]:
    """The weights of the student's modules in turn: layer, name, what was cut, if it is the last.

    Windows and heat maps go to ``start``.
    """
    for index, layer in enumerate(layers):
        record = scores.records[layer]
        windows: dict[str, Window] = {}
        for pair in task.pairs:
            key = f"{student.layers_path}.{index}.{pair.key}"
            if start.network:
                name = f"{skeleton.layers_path}.{layer}.{pair.teacher_key}"
                sums = recorded_sums(record, pair.key)
                windows[pair.key] = subnetwork_window(start.network, index, pair, sums, name)
            else:
                windows[pair.key] = recorded_window(record, pair.key)
            start.windows[key] = windows[pair.key]
            start.heats[key] = recorded_heat(record, pair.key)
        modules = list(dict.fromkeys(pair.student.module for pair in task.pairs))
        for module in modules:
            placed = [
                (
                    _cut(task, source, layer, pair, windows[pair.key], folder),
                    physical_rows(pair.student, task.student.head_dim, 1),
                )
                for pair in task.pairs
                if pair.student.module == module
            ]
            height = task.student.checkpoint.layers[index][f"{module}.weight"].shape[0]
            name = f"{student.layers_path}.{index}.{module}"
            yield index, name, stack_parts(placed, height), module == modules[-1]


_Item = TypeVar("_Item")


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items, each made in a thread of its own while the one before it is in use."""
    with ThreadPoolExecutor(1, "pkt-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _network(task: Task, records: Sequence[Mapping[str, Any]]) -> Subnetwork:
    """The index sets of the kept layers, which show only now."""
    return choose_subnetwork(
        task.pairs,
        ({pair.key: recorded_sums(record, pair.key) for pair in task.pairs} for record in records),
        split_heads(task.teacher, task.student),
        heads_of(task.student),
    )


def _ends(
    task: Task,
    skeleton: Skeleton,
    student: Skeleton,
    source: CheckpointSource,
    ends: Mapping[str, Sequence[float]],
    start: Start,
) -> None:
    """Embedding and head: every vocabulary row; the best run of channels, or the network's."""
    teacher, width = task.teacher, task.student.hidden_size
    for end, piece, theirs, ours in (
        ("embedding", teacher.embedding, skeleton.embedding, student.embedding),
        ("head", teacher.head or teacher.embedding, skeleton.head, student.head),
    ):
        name, rows = ours.removesuffix(".weight"), piece.shape[0]
        sums = np.asarray(ends[end])
        source_name = theirs.removesuffix(".weight")
        if start.network:
            window = channel_window(start.network, sums, rows, source_name)
        else:
            window = choose_columns(sums, width, rows, source_name)
        weight = cut_window(source.window, piece, window, None)
        turned = weight.T if end == "embedding" else weight  # PEFT stores embeddings so
        start.windows[name] = window
        start.factors[name] = _split(task.config, turned.to(source.device), name)
        start.heats[name] = Heat((sums / rows).astype(np.float32)[None], rows, len(sums))


def _split(config: Config, weight: torch.Tensor, name: str) -> Factors:
    if config.select == "orthogonal":
        mixed = mix_seed(config.seed, name)
        return orthogonal_factors(weight, config.rank, config.split, mixed)
    return factorize(weight, config.rank, config.split)


def _cut(
    task: Task,
    source: CheckpointSource,
    layer: int,
    pair: Pair,
    window: Window,
    folder: Path,
) -> torch.Tensor:
    piece = task.teacher.checkpoint.layers[layer][f"{pair.teacher.module}.weight"]
    rows = physical_rows(pair.teacher, task.teacher.head_dim, pair.kv_repeat)
    if window.rows is not None:
        return cut_window(source.window, piece, window, rows)
    mask = _mask_path(folder, layer, pair.key).read_bytes()
    shape = (pair.student.out_features, pair.student.in_features)

    def indices(start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(mask_indices(mask, start, stop))

    return cut_weights(source.window, piece, indices, rows, shape)


def _mask_path(folder: Path, layer: int, key: str) -> Path:
    return folder / f"{mask_name(layer, key)}.bits"


def _mask_digest(folder: Path, layer: int, key: str) -> str:
    path = _mask_path(folder, layer, key)
    return mask_sha256(path.read_bytes()) if path.is_file() else ""
