"""What the teacher's side of an alignment holds, reads and writes: attribution, map, one pass.

The three follow each other, so the largest binds: a layer's recomputation with gradients, the Gram
matrices of both heads, or the pass forward, which `pkt.plan.forward` counts and in which the map is
held too. Of a CUDA device by the same formulas; there it is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import LOGIT_ELEMENTS, MIB
from pkt.models import Model
from pkt.plan.forward import forward_parts, make_forward_plan
from pkt.plan.sizes import (
    BASE_BYTES,
    CALLS_BYTES,
    DEVICE_BASE_BYTES,
    attention_bytes,
    is_eager,
    is_native,
    kept_bytes,
    total_bytes,
    widened,
)
from pkt.records import Plan, PlanPart, Room
from pkt.schedule import peak_boundaries


@dataclass(frozen=True, slots=True)
class Mapped:
    """Activations that are mapped to a student."""

    student: Model
    rows: int  #: of each layer's states
    kept: int  #: raw rows of so many layers on the disk at once, at most
    readings: int  #: times that both heads are read to make M; 0: it needs none
    chunk_elements: int  #: of a head, read at once
    places: int  #: positions of which each layer's states are compared with one another


@dataclass(frozen=True, slots=True)
class Attributed:
    """Texts by which the loss is attributed to layers."""

    tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """Maps that are fitted on both models' activations: of the teacher, then of the student."""

    tokens: tuple[int, int]  #: of the texts
    rows: tuple[int, int]  #: of the largest batch of them
    places: int  #: positions of which states are kept


def make_targets_plan(
    teacher: Model,
    *,
    mapped: Mapped | None = None,
    attributed: Attributed | None = None,
    fitted: Fitted | None = None,
    budget: tuple[int, str],
    room: Room | None = None,
    **forward: Any,
) -> Plan:
    """The plan of targets.

    Args:
        teacher: larger model.
        mapped: the states, if there are any.
        attributed: the texts of attribution, if it is wanted.
        fitted: the texts that maps are fitted on, if they are.
        budget: bytes allowed, and where that number comes from.
        room: what the disks have free; ``None``: enough.
        **forward: of `make_forward_plan`.

    """
    dtype: str = forward["dtype"]
    item = DTYPE_BYTES[dtype]
    plans = {
        slots: make_forward_plan(teacher, budget=(allowed, ""), room=room, **forward)
        for slots, allowed in ((2, 1 << 62), (1, 0))
    }
    matrix, grams = _map_parts(teacher, mapped)
    fit = [_fit(teacher, mapped.student, fitted)] if fitted and mapped else []

    def parts(slots: int) -> tuple[PlanPart, ...]:
        passing = (*plans[slots].parts, *matrix)
        others = [_attribution(teacher, dtype, slots, attributed)] if attributed else []
        if fitted and mapped:
            others += _fit_parts(teacher, mapped.student, dtype, slots, fitted)
        return max((passing, grams, *others), key=total_bytes)

    sizes = {slots: total_bytes(parts(slots)) for slots in (2, 1)}
    slots = next((count for count, size in sizes.items() if size <= budget[0]), 1)
    base = plans[slots]
    spool, read, flop, every = base.spool_bytes, base.read_bytes, base.flop, 1
    if mapped:
        spool += mapped.kept * mapped.rows * teacher.hidden_size * item
        read += mapped.readings * sum((m.head or m.embedding).bytes for m in _both(teacher, mapped))
    if attributed:
        every, more = _boundaries(teacher, attributed, item, room)
        spool = max(spool, more)
        layers = sum(p.bytes for pieces in teacher.checkpoint.layers for p in pieces.values())
        read += 2 * layers + (teacher.head or teacher.embedding).bytes + teacher.embedding.bytes
        flop += 3 * flop * attributed.tokens // max(1, forward["tokens"])
    if fitted and mapped:
        for model, tokens in zip((teacher, mapped.student), fitted.tokens, strict=True):
            # What a layer of the sweep has on the disk, and the kept rows of every layer.
            rows = 2 * tokens + (model.layers + 1) * fitted.places
            spool = max(spool, rows * model.hidden_size * item)
            read += sum(p.bytes for pieces in model.checkpoint.layers for p in pieces.values())
            read += model.embedding.bytes
        flop += flop * fitted.tokens[0] // max(1, forward["tokens"])
    return replace(
        base,
        budget_bytes=budget[0],
        budget_source=budget[1],
        parts=parts(slots),
        smallest_bytes=-(-sizes[1] // MIB) * MIB,
        slots=slots,
        read_bytes=read,
        spool_bytes=spool,
        spool_every=every,
        passes=1 + 2 * bool(attributed) + bool(fitted),
        flop=flop,
        least_spool=(every, spool),
        device_parts=_on_device(teacher, dtype, forward, matrix, [grams, *fit], attributed),
    )


def _both(teacher: Model, mapped: Mapped) -> tuple[Model, Model]:
    return teacher, mapped.student


def _map_parts(
    teacher: Model, mapped: Mapped | None
) -> tuple[list[PlanPart], tuple[PlanPart, ...]]:
    """M beside the pass forward, and all that is held while it is made."""
    if mapped is None:
        return [], ()
    wide, narrow = teacher.hidden_size, mapped.student.hidden_size
    compared = mapped.places * (12 * wide + 16 * mapped.places)
    matrix = [
        PlanPart("map, float32", 4 * wide * narrow, f"{narrow} × {wide}"),
        PlanPart("states compared", compared, f"{mapped.places} positions, float64"),
    ]
    if not mapped.readings:
        return matrix, ()
    grams = 8 * (3 * wide * wide + 3 * narrow * narrow + 2 * wide * narrow)
    return matrix, (
        PlanPart("torch, transformers", BASE_BYTES),
        *matrix,
        PlanPart("Gram matrices, factors", grams, "float64"),
        PlanPart("chunks of the heads", 48 * mapped.chunk_elements, "float64"),
    )


def _fit_parts(
    teacher: Model, student: Model, dtype: str, slots: int, wanted: Fitted
) -> list[tuple[PlanPart, ...]]:
    """Both models' passes over the texts, and one pair's map while it is fitted."""
    base = PlanPart("torch, transformers", BASE_BYTES)
    passes = [
        (base, *weights, *used)
        for model, rows in zip((teacher, student), wanted.rows, strict=True)
        for weights, used in [forward_parts(model, slots, dtype, rows)]
    ]
    slot = forward_parts(student, slots, dtype, wanted.rows[1])[0]
    return [*passes, (base, *slot, *_fit(teacher, student, wanted)[1:])]


def _fit(teacher: Model, student: Model, wanted: Fitted) -> tuple[PlanPart, ...]:
    wide, narrow, count = teacher.hidden_size, student.hidden_size, wanted.places
    both = count * (wide + narrow)
    return (
        PlanPart("libraries", DEVICE_BASE_BYTES),
        PlanPart("paired states", (4 + 3 * 8) * both, f"{count} positions, float64"),
        PlanPart(
            "the fit of a map",
            8 * (4 * min(count, wide) ** 2 + 3 * wide * narrow),
            f"{narrow} × {wide}, float64",
        ),
    )


def _attribution(
    teacher: Model, dtype: str, slots: int, wanted: Attributed
) -> tuple[PlanPart, ...]:
    """One layer recomputed with gradients of activations alone, or the head with its logits'."""
    item = DTYPE_BYTES[dtype]
    layer = _largest(teacher)
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    ahead = f"{slots}, {'ahead' if slots > 1 else 'in turn'}"
    shared = [
        PlanPart("torch, transformers", BASE_BYTES),
        PlanPart("layer slots", slots * slot, ahead),
    ]
    if not is_native(layer, dtype):
        elements = sum(p.elements for p in layer.values() if p.dtype in DTYPE_BYTES)
        shared.append(PlanPart("weights converted", elements * item, f"to {dtype}"))
    sweep = [*shared, *_gradients(teacher, item, wanted)]
    head = teacher.head or teacher.embedding
    size = head.elements * (DTYPE_BYTES[head.dtype] + (0 if head.dtype == dtype else item))
    logits = PlanPart("logits", LOGIT_ELEMENTS * (2 * item + 14))
    return tuple(max((sweep, [*shared, PlanPart("head", size), logits]), key=total_bytes))


def _gradients(teacher: Model, item: int, wanted: Attributed) -> list[PlanPart]:
    matrices = [p for p in _largest(teacher).values() if len(p.shape) == 2]
    widths = [*(w for p in matrices for w in p.shape), *(8 * [teacher.hidden_size])]
    activations = sum(kept_bytes(wanted.longest * width * item) for width in widths)
    activations += attention_bytes(teacher, wanted.longest, wanted.longest, item)
    activations += 4 * 8 * wanted.longest * teacher.hidden_size  # products in float64
    mask = 2 * wanted.longest * wanted.longest * (item if is_eager(teacher) else 1)
    return [
        PlanPart("activations and gradients of one text", activations, f"{wanted.longest} tokens"),
        *widened("BF16" if item == 2 else "F32", wanted.longest, widths),
        PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
    ]


def _boundaries(
    teacher: Model, wanted: Attributed, item: int, room: Room | None
) -> tuple[int, int]:
    """Which boundaries attribution keeps, every k-th, and their bytes: all, if there is room."""
    block = wanted.tokens * teacher.hidden_size * item
    sizes = {
        every: peak_boundaries(teacher.layers, every, last=False) * block
        for every in range(1, teacher.layers + 1)
    }
    least = min(sizes, key=lambda every: (sizes[every], every))
    fitting = (k for k, size in sizes.items() if room is None or size <= room.spool_free)
    every = next(fitting, least)
    return every, sizes[every]


def _on_device(
    teacher: Model,
    dtype: str,
    forward: dict[str, Any],
    matrix: Sequence[PlanPart],
    making: Sequence[Sequence[PlanPart]],
    attributed: Attributed | None,
) -> tuple[PlanPart, ...]:
    """Of a CUDA device: a layer at work and the next one, whatever the slots."""
    item = DTYPE_BYTES[dtype]
    elements = sum(p.elements for p in _largest(teacher).values() if p.dtype in DTYPE_BYTES)
    shared = [
        PlanPart("libraries", DEVICE_BASE_BYTES),
        PlanPart("weights", 2 * elements * item, "a layer at work, the next one copied"),
        *matrix,
    ]
    longest = attributed.longest if attributed else 0
    texts = Attributed(0, max(longest, forward["rows"]))
    sweep = [*shared, *_gradients(teacher, item, texts)]
    head = teacher.head or teacher.embedding
    ends = [
        *shared,
        PlanPart("head", head.elements * item),
        PlanPart("logits", LOGIT_ELEMENTS * (2 * item + 14)),
    ]
    others = [[shared[0], *parts[1:]] for parts in making]
    return tuple(max((sweep, ends, *others), key=total_bytes))


def _largest(teacher: Model) -> Any:
    layers = teacher.checkpoint.layers
    return max(layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
