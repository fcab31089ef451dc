"""The maps of a pair of models: their heads opened, bases made, M kept and used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.checkpoint import Piece
from pkt.host import release_free_memory
from pkt.models import Model
from pkt.records import SharedTokens
from pkt.semantics import (
    MAPS,
    Bases,
    Evidence,
    HeadPair,
    Rows,
    final_norm,
    load_map,
    no_norm,
    save_map,
)
from pkt.stream import TORCH_DTYPES, CheckpointSource
from pkt.sweep import build_skeleton
from pkt.sweep.placement import Placement


@dataclass(frozen=True)
class Made:
    """A pair's maps (D_S, D_T) float32 by name, and what was found of the heads on the way."""

    maps: dict[str, torch.Tensor]
    heads: dict[str, Any]
    self_cosine: dict[str, float] | None  #: of teacher and student; None where v1 was not asked for
    reused: tuple[str, ...]  #: names of maps that lay there already


def open_heads(
    teacher: Model,
    student: Model,
    shared: SharedTokens,
    *,
    end: str = "head",
    fold_norm: bool = True,
    io: str = "mmap",
    device: str = "cpu",
) -> HeadPair:
    """The rows of both heads, or of both input embeddings, for the shared tokens.

    A head that is tied is the embedding's tensor. What a head adds to all states alike (its bias,
    the offset of a LayerNorm) and soft caps, which keep the order of logits, play no part.
    """
    both = [
        _rows(model, end, fold_norm and end == "head", io, device) for model in (teacher, student)
    ]
    return HeadPair(both[0], both[1], torch.tensor(list(shared.pairs)).view(-1, 2))


def pair_maps(
    names: Sequence[str],
    heads: HeadPair,
    embeddings: Callable[[], HeadPair],
    folder: Path | None = None,
    *,
    seed: int = 0,
    notify: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """The maps of ``names`` that one pair of models has, those of paired states left out.

    Args:
        names: of `pkt.semantics.MAPS`.
        heads: opened heads.
        embeddings: opens the input embeddings, if a map needs them.
        folder: of maps made earlier, which are used again where their inputs are these;
            ``None``: none are kept.
        seed: of the map ``random``, and of the probes.
        notify: told of (maps made, maps in all).

    """
    wanted = [name for name in names if not MAPS[name].fitted]
    sizes = (heads.teacher.width, heads.student.width)
    opened: dict[str, Bases] = {}
    made, facts, reused = {}, {}, []
    inputs = _inputs(heads, seed)
    for number, name in enumerate(wanted, 1):
        needs = MAPS[name].needs
        if needs == "sizes":
            made[name] = MAPS[name].make(Evidence(sizes, seed=seed)).float()
            notify(number, len(wanted))
            continue
        if needs == "embedding":
            opened.clear()  # its matrices are as large: one pair of them at a time
        pair = heads if needs == "head" else embeddings()
        based = {**(inputs if needs == "head" else _inputs(pair, seed)), "map": name}
        path = folder / f"{name}.safetensors" if folder else None
        held = load_map(path, based) if path else None
        if held is None:
            if needs not in opened:
                opened[needs] = Bases(pair, seed)
            held = _make(name, opened[needs])
            if path:
                save_map(path, held[0], based, held[1])
        else:
            reused.append(name)
        made[name], facts[name] = held
        notify(number, len(wanted))
    ordered = {name: made[name] for name in wanted}
    of_heads = [facts[name] for name in wanted if MAPS[name].needs == "head"]
    found = of_heads[0]["heads"] if of_heads else Bases(heads, seed).facts()
    opened.clear()
    release_free_memory()
    self_cosine = facts["cosine"]["self_cosine"] if "cosine" in facts else None
    return Made(ordered, found, self_cosine, tuple(reused))


def _make(name: str, bases: Bases) -> tuple[torch.Tensor, dict[str, Any]]:
    kind = MAPS[name]
    found = kind.make(Evidence((0, 0), bases)).float()
    about: dict[str, Any] = {"heads": bases.facts()}
    if name == "cosine":
        both = bases.recomposed
        about["self_cosine"] = {"teacher": both.teacher_self, "student": both.student_self}
    return found, about


def _inputs(pair: HeadPair, seed: int) -> Mapping[str, Any]:
    """What the maps of a pair depend on, by hashes."""
    return {
        "format": 1,
        "teacher": pair.teacher.sha256(),
        "student": pair.student.sha256(),
        "tokens": pair.sha256(),
        "seed": seed,
    }


def _rows(model: Model, end: str, fold_norm: bool, io: str, device: str) -> Rows:
    skeleton = build_skeleton(model.folder, torch.float32)
    placement = Placement(skeleton, model.checkpoint, 1)
    piece: Piece = placement.head if end == "head" else placement.embedding
    norm = no_norm(piece.shape[1])
    if fold_norm:
        source = CheckpointSource(model.checkpoint, io, 1, torch.float32, torch.device("cpu"))
        outer = source.read(placement.outer())
        norm = final_norm(lambda h: skeleton.normed(h, outer), piece.shape[1], model.family)
    stored = TORCH_DTYPES[piece.dtype]
    source = CheckpointSource(model.checkpoint, io, 1, stored, torch.device(device))
    return Rows(piece, model.checkpoint.shard_name(piece), source.read, norm)
