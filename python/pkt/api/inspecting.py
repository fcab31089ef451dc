"""`pkt.inspect`: what the command of this name does, as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt.api.choices import budget, checked_every, compute_dtype, optional_path
from pkt.api.fitting import kept_records
from pkt.api.vocabulary import vocabulary_problems
from pkt.batches import most_rows, shapes
from pkt.config import load_aliases
from pkt.models import Model, open_model
from pkt.plan import make_plan
from pkt.projections import Pair, match, projections_of
from pkt.records import Inspection, Select
from pkt.workplace import room


def inspect(
    teacher: str,
    student: str | None = None,
    *,
    max_ram: str | None = None,
    rank: int = 16,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    dtype: str = "auto",
    seeds: int = 32,
    tokens: int = 2048,
    select: Select = "window",
    spool_dir: str | Path | None = None,
    spool_every: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Inspection:
    """Families, shapes, what fits what, and the plan of a run, from headers alone.

    No weight is read and torch is not loaded. What forbids the run is in ``problems``; only
    models that cannot be opened at all raise.

    Args:
        teacher: folder, hub id or alias.
        student: the same; ``None`` describes the teacher alone.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        rank: of the adapter.
        targets: roles or module names; ``None`` for all projections.
        embeddings: whether embedding and head are extracted too.
        dtype: auto, float32 or bfloat16.
        seeds: number of seeds assumed.
        tokens: length of a seed assumed.
        select: strategy; each has its own needs of disk, and ``consistent`` of shapes.
        spool_dir: where the spool would lie; ``None``: below an output folder on the disk of the
            current one.
        spool_every: every k-th layer's inputs are kept there; ``None``: the smallest k that fits.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        PktError: and its subclasses, when a model cannot be opened.

    """
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student") if student else None
    pairs: list[Pair] = []
    rows: list[Any] = []
    problems: list[str] = []
    if small:
        pairs, rows, problems = match(
            big, small, targets, embeddings, whole_heads=select == "consistent"
        )
        if embeddings:
            problems += vocabulary_problems(big, small)
    else:
        projections_of(big)  # refuses layers that no student could be cut from
    tokens = min(tokens, big.positions or tokens)
    plan = make_plan(
        big, small, pairs, dtype=compute_dtype(big, dtype), rank=rank, tokens=seeds * tokens,
        longest=tokens, rows=most_rows([tokens] * seeds), shapes=shapes([tokens] * seeds),
        budget=budget(max_ram), embeddings=embeddings, every=checked_every(spool_every),
        room=room(Path("OUT"), optional_path(spool_dir)), **kept_records(select),
    )  # fmt: skip
    notes = [f"{seeds} seeds of {tokens} tokens assumed"]
    for model in (big, small):
        if model and model.checkpoint.unindexed:
            extra = model.checkpoint.unindexed
            count = f"{len(extra)} tensors are not in the index"
            notes.append(f"{model.folder}: {count}: {extra[0]}, …")
    return Inspection(
        teacher=description(big),
        student=description(small) if small else None,
        rows=tuple(rows),
        plan=plan,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def description(model: Model) -> dict[str, Any]:
    """What `inspect` says of a model."""
    return {
        "name": model.name,
        "folder": str(model.folder),
        "family": model.family,
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "vocabulary": model.embedding.shape[0],
        "tied_head": model.head is None,
        "dtypes": model.checkpoint.dtypes(),
        "parameters": sum(p.elements for layer in model.checkpoint.layers for p in layer.values())
        + sum(p.elements for p in model.checkpoint.outer.values()),
        "bytes": model.checkpoint.bytes,
        "shards": len(model.checkpoint.files),
    }
