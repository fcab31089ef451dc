"""SEEKING: a LoRA start for a small student from a large teacher's most sensitive parameters.

Zhong et al., "Seeking Neural Nuggets: Knowledge Transfer in Large Language Models from a
Parametric Perspective", ICLR 2024, https://arxiv.org/abs/2310.11451, sections 3.1 and 3.2.

=================  ======================================================
paper              here
=================  ======================================================
sensitivity        `LayerScores`, summed over seeds, one layer at a time
layer selection    `pick_layers`: the student's number of teacher layers
sub-matrix         `choose` and `cut_window`: the window of largest sum
W = UΣVᵀ → B, A    `factorize`
=================  ======================================================
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pkt
from pkt.adapter import adapter_config, adapter_tensors, check_adapter, write_adapter
from pkt.card import model_card
from pkt.cutting import cut_weights, cut_window, stack_parts
from pkt.factorization import factorize, orthogonal_factors
from pkt.host import PeakMeter, describe
from pkt.models import Model
from pkt.output import MANIFEST, publish, run_folder
from pkt.projections import Pair, physical_rows
from pkt.records import Extraction, Factors, Heat, LayerRule, Plan, SeedSet, Select, Split, Window
from pkt.report import write_report
from pkt.selection import (
    Cut,
    Ranking,
    choose_columns,
    mask_indices,
    mask_name,
    mix_seed,
    pick_layers,
    recorded_heat,
    recorded_window,
)
from pkt.sensitivity import LayerScores, accumulate_columns
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import Skeleton, Spool, Sweep, build_skeleton

Notify = Callable[[str, int, int], None]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Config:
    """The options that change the result of an extraction."""

    rank: int = 16
    layers: LayerRule = "sensitivity"
    select: Select = "window"
    split: Split = "paper"
    targets: tuple[str, ...] | None = None  #: roles or module names; None: all projections
    embeddings: bool = False
    dtype: str = "BF16"  #: computed in: "F32" or "BF16"
    seed: int = 0  #: of the random strategies


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that a run needs, opened and found to fit."""

    teacher: Model
    student: Model
    seeds: SeedSet
    pairs: Sequence[Pair]
    plan: Plan
    config: Config
    seed_options: Mapping[str, Any]  #: template, max_tokens, limit
    base_model: str  #: the student as the user named it, for the adapter and its card

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: the manifest without what it found."""
        config = self.config
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "seeking",
            "teacher": self.teacher.hashes(),
            "student": self.student.hashes(),
            "seeds": {
                "count": len(self.seeds.seeds),
                "tokens": self.seeds.tokens,
                "loss_tokens": self.seeds.loss_tokens,
                "sha256": self.seeds.sha256,
            },
            "options": {
                "rank": config.rank,
                "layers": config.layers,
                "select": config.select,
                "split": config.split,
                "targets": list(config.targets) if config.targets else None,
                "embeddings": config.embeddings,
                "dtype": config.dtype,
                "seed": config.seed,
                **self.seed_options,
            },
        }


@dataclass
class Costs:
    """What the run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run(
    task: Task,
    folder: Path,
    *,
    io: str,
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Extraction:
    """Extract a LoRA start; the same call continues a run that was interrupted.

    Args:
        task: opened inputs and options.
        folder: OUT.
        io: mmap, buffered or direct.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        notify: told of (phase, steps done, steps in all).

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    config, place = task.config, torch.device(device)
    dtype = DTYPES[config.dtype]
    costs, peak = Costs(), PeakMeter()
    work_identity = {**task.identity(), "device": place.type}
    with peak.running(), run_folder(folder, work_identity, overwrite) as work:
        with costs.phase("skeleton"):
            skeleton = build_skeleton(task.teacher.folder, dtype, place)
            student = build_skeleton(task.student.folder, torch.float32)
        source = CheckpointSource(task.teacher.checkpoint, io, task.plan.slots, dtype, place)
        try:
            # 1. Sensitivity of every teacher parameter, summed over the seeds.
            losses, records, ends = _sweep(task, skeleton, source, work, notify, costs)
            scores = [float(record["score"]) for record in records]
            # 2. The teacher layers that feed the student's, in order.
            layers = pick_layers(scores, task.student.layers, config.layers, config.seed)
            # 3. The most sensitive sub-matrix of every kept weight; 4. its leading factors.
            with costs.phase("factors"):
                windows, factors = _factors(task, student, source, records, layers, work, notify)
                if config.embeddings:
                    _factor_ends(task, skeleton, student, source, ends, windows, factors)
        finally:
            source.close()
        manifest = {
            **task.identity(),
            "loss": sum(losses) / len(losses),
            "layer_scores": scores,
            "layers": layers,
            "windows": {key: manifest_window(window) for key, window in windows.items()},
        }
        staged = work / "result"
        staged.mkdir(exist_ok=True)
        with costs.phase("write"):
            every = config.targets is None
            settings = adapter_config(factors, config.rank, task.base_model, every)
            write_adapter(staged, settings, adapter_tensors(factors, _embedding(student, factors)))
            check_adapter(staged, task.student.folder)
        with costs.phase("report"):
            heats = _heats(task, student, records, layers) | _end_heats(student, ends, manifest)
            spectra = {name: f.singular_values for name, f in factors.items()}
            energy = {name: _energy(f) for name, f in factors.items()}
            write_report(staged / "report", manifest, heats, spectra, energy)
        record = _run_record(task, source, costs, peak)
        texts = {
            "README.md": model_card(manifest, task.base_model),
            "pkt_run.json": _json(record),
            MANIFEST: _json(manifest),
        }
        publish(folder, staged, texts)
    return Extraction(folder, manifest, record)


def _sweep(
    task: Task,
    skeleton: Skeleton,
    source: CheckpointSource,
    work: Path,
    notify: Notify,
    costs: Costs,
) -> tuple[list[float], list[dict[str, Any]], dict[str, list[float]]]:
    config, checkpoint = task.config, task.teacher.checkpoint
    whole = task.plan.scores == "layer"
    spool = Spool(
        work / "spool",
        [len(seed.tokens) for seed in task.seeds.seeds],
        task.teacher.hidden_size,
        DTYPES[config.dtype],
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
    elements = [p.elements for layer in checkpoint.layers for p in layer.values()]
    largest = max(sum(p.elements for p in layer.values()) for layer in checkpoint.layers)
    memory = torch.empty(largest if whole else max(elements), device=source.device)
    observer = LayerScores(memory, ranking.matrix, ranking.layer)
    row_bytes = task.teacher.embedding.bytes // task.teacher.embedding.shape[0]
    sweep = Sweep(
        skeleton=skeleton,
        checkpoint=checkpoint,
        seeds=task.seeds.seeds,
        spool=spool,
        source=source,
        device=source.device,
        whole_layer=whole,
        chunk_rows=max(1, (source.slot_bytes - PAGE) // row_bytes),
        keep_last=config.embeddings,
        notify=notify,
        seconds=costs.seconds,
    )
    losses, records = sweep.run(observer)
    del observer, memory  # the scores' memory makes room for the head
    source.close()
    ends = sweep.ends(accumulate_columns) if config.embeddings else {}
    return losses, records, ends


def _factors(
    task: Task,
    student: Skeleton,
    source: CheckpointSource,
    records: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    work: Path,
    notify: Notify,
) -> tuple[dict[str, Window], dict[str, Factors]]:
    config = task.config
    windows: dict[str, Window] = {}
    factors: dict[str, Factors] = {}
    for index, layer in enumerate(layers):
        record, parts = records[layer], {}
        for pair in task.pairs:
            window = recorded_window(record, pair.key)
            windows[f"{student.layers_path}.{index}.{pair.key}"] = window
            parts[pair] = _cut(task, source, layer, pair, window, work)
        for module in dict.fromkeys(pair.student.module for pair in task.pairs):
            mine = {p: w for p, w in parts.items() if p.student.module == module}
            weight = stack_parts(
                [(w, physical_rows(p.student, task.student.head_dim, 1)) for p, w in mine.items()]
            )
            name = f"{student.layers_path}.{index}.{module}"
            factors[name] = _split(config, weight, name)
        notify("factors", index + 1, len(layers))
    return windows, factors


def _factor_ends(
    task: Task,
    skeleton: Skeleton,
    student: Skeleton,
    source: CheckpointSource,
    ends: Mapping[str, Sequence[float]],
    windows: dict[str, Window],
    factors: dict[str, Factors],
) -> None:
    """Embedding and head: every vocabulary row, the best run of channels."""
    config, teacher = task.config, task.teacher
    width = task.student.hidden_size
    for end, piece, theirs, ours in (
        ("embedding", teacher.embedding, skeleton.embedding, student.embedding),
        ("head", teacher.head or teacher.embedding, skeleton.head, student.head),
    ):
        name = ours.removesuffix(".weight")
        sums = np.asarray(ends[end])
        window = choose_columns(sums, width, piece.shape[0], theirs.removesuffix(".weight"))
        weight = source.window(piece, range(piece.shape[0]), window.col_range)
        turned = weight.T if end == "embedding" else weight  # PEFT stores embeddings so
        windows[name] = window
        factors[name] = _split(config, turned, name)


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
    work: Path,
) -> torch.Tensor:
    piece = task.teacher.checkpoint.layers[layer][f"{pair.teacher.module}.weight"]
    rows = physical_rows(pair.teacher, task.teacher.head_dim, pair.kv_repeat)
    if window.rows is not None:
        return cut_window(source.window, piece, window, rows)
    mask = (work / "spool" / f"{mask_name(layer, pair.key)}.bits").read_bytes()
    shape = (pair.student.out_features, pair.student.in_features)

    def indices(start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(mask_indices(mask, start, stop))

    return cut_weights(source.window, piece, indices, rows, shape)


def manifest_window(window: Window) -> dict[str, Any]:
    """A window as `pkt_manifest.json` holds it."""
    entry: dict[str, Any] = {"teacher": window.teacher}
    if window.rows is not None and window.cols is not None:
        entry |= {"rows": list(window.rows), "cols": list(window.cols)}
    else:
        entry["sha256"] = window.mask_sha256
    return entry | {"score": window.score, "kv_repeat": window.kv_repeat}


def _heats(
    task: Task, student: Skeleton, records: Sequence[Mapping[str, Any]], layers: Sequence[int]
) -> dict[str, Heat]:
    return {
        f"{student.layers_path}.{index}.{pair.key}": recorded_heat(records[layer], pair.key)
        for index, layer in enumerate(layers)
        for pair in task.pairs
    }


def _end_heats(
    student: Skeleton, ends: Mapping[str, Sequence[float]], manifest: Mapping[str, Any]
) -> dict[str, Heat]:
    names = {"embedding": student.embedding, "head": student.head}
    heats = {}
    for end, sums in ends.items():
        name = names[end].removesuffix(".weight")
        rows = manifest["windows"][name]["rows"][1]
        heats[name] = Heat(np.asarray(sums, dtype=np.float32)[None] / rows, rows, len(sums))
    return heats


def _energy(factors: Factors) -> float:
    kept = max(factors.norm**2 - factors.residual**2, 0.0) ** 0.5
    return kept / factors.norm if factors.norm else 0.0


def _embedding(student: Skeleton, factors: Mapping[str, Factors]) -> str | None:
    name = student.embedding.removesuffix(".weight")
    return name if name in factors else None


def _run_record(
    task: Task, source: CheckpointSource, costs: Costs, peak: PeakMeter
) -> dict[str, Any]:
    counts = source.counts()
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
        "slots": task.plan.slots,
        "scores": task.plan.scores,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "host": describe(),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
