"""What an extraction will hold, read and write, worked out from headers before anything is read.

Anonymous memory only: mapped and cached pages are the kernel's to take back. Three phases bind:
one layer's sweep, the head with its logits, and the factors; the plan lists the largest. So it
does for the memory of a CUDA device, by the same formulas; there it is an estimate, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import LOGIT_ELEMENTS, MIB
from pkt.models import Model
from pkt.plan.sizes import (
    BASE_BYTES,
    CALLS_BYTES,
    DEVICE_BASE_BYTES,
    DEVICE_BLOCK_BYTES,
    INDEX_BYTES,
    SEED_BYTES,
    attention_bytes,
    block_bytes,
    factoring_bytes,
    is_eager,
    is_native,
    kept_bytes,
    kept_products,
    total_bytes,
    widened,
)
from pkt.projections import Pair
from pkt.records import Plan, PlanPart, Room
from pkt.schedule import peak_boundaries, schedule, turns


def make_plan(
    teacher: Model,
    student: Model | None,
    pairs: Sequence[Pair],
    *,
    dtype: str,
    rank: int,
    tokens: int,
    longest: int,
    rows: int,
    shapes: int,
    seeds: int | None = None,
    budget: tuple[int, str],
    embeddings: bool = False,
    masks: bool = False,
    crossed: bool = False,
    sums: bool = False,
    every: int | None = None,
    room: Room | None = None,
) -> Plan:
    """The plan of an extraction.

    Args:
        teacher: larger model.
        student: smaller model, if it is known yet.
        pairs: matrices to be cut.
        dtype: computed in, "F32" or "BF16".
        rank: of the adapter.
        tokens: of all seeds.
        longest: tokens of the longest seed.
        rows: of the largest batch of seeds, as `pkt.batches` has them.
        shapes: number of different batches, by seeds and rows.
        seeds: tokens that this process holds, those of the others' seeds included; ``None``: the
            same as ``tokens``.
        budget: bytes allowed, and where that number comes from.
        embeddings: whether embedding and head are extracted too.
        masks: whether single weights are chosen, whose bit masks are kept.
        crossed: whether rows and columns are chosen one by one: the columns between are read too.
        sums: whether the records of all layers, held to the end, keep row and column sums.
        every: every k-th layer's inputs are kept on the disk; ``None``: the smallest k that the
            disk has room for.
        room: what the disks have free; ``None``: enough.

    Returns:
        the plan with the fastest setting (slots, scores) that fits, or the smallest if none does.
        What is left of the budget becomes slots: as many layers stay in memory when the order
        turns round.

    """
    item = DTYPE_BYTES[dtype]
    layer = max(teacher.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    matrices = [p for p in layer.values() if len(p.shape) == 2]
    kinds = len({p.shape for p in matrices})
    elements = sum(p.elements for p in layer.values() if p.dtype in DTYPE_BYTES)
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    converted = 0 if is_native(layer, dtype) else elements * item
    head = teacher.head or teacher.embedding
    head_bytes = head.elements * (DTYPE_BYTES[head.dtype] + (0 if head.dtype == dtype else item))
    logits = LOGIT_ELEMENTS * (2 * item + 14)  # in the head's type and in float32, and gradients
    widths = [*(width for p in matrices for width in p.shape), *(8 * [teacher.hidden_size])]
    activations = sum(kept_bytes(rows * width * item) for width in widths)
    activations += attention_bytes(teacher, rows, longest, item)
    mask = 2 * longest * longest * (item if is_eager(teacher) else 1)  # sliding and full
    adapter = _adapter_bytes(student, pairs, rank, embeddings)
    known = {p.dtype for p in matrices if p.dtype in DTYPE_BYTES}
    stored = max(known, key=lambda kind: (DTYPE_BYTES[kind], kind), default=dtype)
    window = _window_bytes(pairs, rank, stored)
    if embeddings and student:
        vocabulary, width = student.embedding.shape
        window = max(window, factoring_bytes(vocabulary, width, rank, stored))
    listed = sum(p.student.out_features + p.student.in_features for p in pairs) if crossed else 0
    base = PlanPart("torch, transformers, peft", BASE_BYTES)
    texts = PlanPart("seeds", SEED_BYTES * (tokens if seeds is None else seeds))
    records = (_sums_bytes(pairs) if sums else _packed_bytes(listed)) * teacher.layers
    kept = [PlanPart(f"{'sums' if sums else 'choices'} of every layer", records)][: records > 0]
    largest = max((p.elements for p in matrices), default=0)

    def phases(
        shared: list[PlanPart], matrix: bool, block: int, *, on_cpu: bool
    ) -> tuple[list[PlanPart], ...]:
        held = largest if matrix else elements
        sweep = [
            *shared,
            PlanPart("scores, float32", 4 * held, "one matrix" if matrix else "one layer"),
            PlanPart("gradient block", block),
            PlanPart("activations of a batch", activations, f"{rows} tokens"),
            *(widened(dtype, rows, widths) if on_cpu else []),
            *(kept_products(dtype, shapes, kinds) if on_cpu else []),
            PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
        ]
        ends = [*shared, PlanPart("head", head_bytes), PlanPart("logits", logits)]
        ends += widened(dtype, longest, [*head.shape]) if on_cpu else []
        if embeddings:
            ends.append(PlanPart("logit gradients of one seed", longest * head.shape[0] * item * 2))
        return sweep, ends

    def parts(slots: int, matrix: bool) -> tuple[PlanPart, ...]:
        shared = [
            base,
            *kept,
            texts,
            PlanPart(
                "layer slots", slots * slot, f"{slots}, {'ahead' if slots > 1 else 'in turn'}"
            ),
        ]
        if converted:
            shared.append(PlanPart("weights converted", converted, f"to {dtype}"))
        if room and room.spool_in_memory:
            more = max(0, spool(kept_every(matrix), matrix) - room.spool_held) // room.sharing
            shared.append(PlanPart("layer inputs", more, "their folder is in memory"))
        sweep, ends = phases(shared, matrix, block_bytes(dtype), on_cpu=True)
        factors = [
            base,
            *kept,
            texts,
            PlanPart("largest window", window),
            PlanPart("adapter", adapter),
        ]
        if listed and student:
            size = INDEX_BYTES * listed * student.layers
            factors.append(PlanPart("chosen rows and columns", size))
        return tuple(max((sweep, ends, factors), key=total_bytes))

    def on_device(matrix: bool) -> tuple[PlanPart, ...]:
        """Of a CUDA device: two layers whatever the slots, which lie in the host's memory."""
        shared = [
            PlanPart("libraries", DEVICE_BASE_BYTES),
            PlanPart("weights", 2 * elements * item, "a layer at work, the next one copied"),
        ]
        if converted:
            stored = max((p.bytes for p in matrices), default=0)
            shared.append(PlanPart("largest weight as stored", stored))
        sweep, ends = phases(shared, matrix, DEVICE_BLOCK_BYTES, on_cpu=False)
        ends.append(sweep[len(shared)])  # scores: what is allocated there is taken, used or not
        factors = [shared[0], PlanPart("largest window", window)]
        return tuple(max((sweep, ends, factors), key=total_bytes))

    block = tokens * teacher.hidden_size * item
    crossing = tokens * sum(p.shape[0] + p.shape[1] for p in matrices) * item
    if masks:
        records += teacher.layers * sum(p.teacher_rows * p.teacher.in_features // 8 for p in pairs)
    free = _spool_room(room, records + adapter)
    choices = range(1, teacher.layers + 1)

    def spool(every: int, matrix: bool) -> int:
        boundaries = peak_boundaries(teacher.layers, every, embeddings) * block
        return boundaries + (crossing if matrix else 0)

    def least_every(matrix: bool) -> int:
        return min(choices, key=lambda k: spool(k, matrix)) if room else 1

    def kept_every(matrix: bool) -> int:
        if every is not None:
            return every
        fits = (k for k in choices if free is None or spool(k, matrix) <= free)
        return next(fits, least_every(matrix))

    settings = [(2, False), (1, False), (2, True), (1, True)]
    sizes = {s: total_bytes(parts(*s)) for s in settings}
    fitting = [s for s in settings if sizes[s] <= budget[0]]
    smallest = min(settings, key=lambda s: (sizes[s], settings.index(s)))
    slots, matrix = fitting[0] if fitting else smallest
    while slots < teacher.layers and total_bytes(parts(slots + 1, matrix)) <= budget[0]:
        slots += 1
    chosen, least = kept_every(matrix), least_every(matrix)
    steps = schedule(teacher.layers, chosen, last=embeddings)
    uses = [step.layer for step in steps if step.kind in ("forward", "backward")]
    again = sum(step.kind == "forward" and step.again for step in steps)
    products = 2 * tokens * sum(p.elements for p in matrices)  # of one layer, one way
    return Plan(
        budget_bytes=budget[0],
        budget_source=budget[1],
        parts=parts(slots, matrix),
        smallest_bytes=-(-sizes[smallest] // MIB) * MIB,
        slots=slots,
        scores="matrix" if matrix else "layer",
        read_bytes=_read_bytes(
            teacher, student, pairs, embeddings, crossed, masks, sums, uses, slots
        ),
        spool_bytes=spool(chosen, matrix),
        record_bytes=records,
        spool_every=chosen,
        recomputed_layers=again,
        flop=(4 * teacher.layers + again) * products + 4 * tokens * head.elements,
        adapter_bytes=adapter,
        room=room,
        least_spool=(least, spool(least, matrix)),
        device_parts=on_device(matrix),
    )


def _spool_room(room: Room | None, others: int) -> int | None:
    """Bytes that the spool may take; ``None``: as many as it likes."""
    if room is None:
        return None
    return room.spool_free - (others if room.shared else 0)


def _window_bytes(pairs: Sequence[Pair], rank: int, dtype: str) -> int:
    """The largest student module while its factors are made."""
    heights: dict[tuple[str, int], int] = {}
    for pair in pairs:
        module = pair.student.module, pair.student.in_features
        heights[module] = heights.get(module, 0) + pair.student.out_features
    sizes = (factoring_bytes(high, wide, rank, dtype) for (_, wide), high in heights.items())
    return max(sizes, default=0)


def _adapter_bytes(
    student: Model | None, pairs: Sequence[Pair], rank: int, embeddings: bool
) -> int:
    if student is None:
        return 0
    layers = sum(
        min(rank, p.student.out_features, p.student.in_features)
        * (p.student.out_features + p.student.in_features)
        for p in pairs
    )
    ends = 2 * rank * sum(student.embedding.shape) if embeddings else 0
    return 4 * (layers * student.layers + ends)


def _sums_bytes(pairs: Sequence[Pair]) -> int:
    """Row and column sums of a layer, in float64 as base64."""
    return 2 * _packed_bytes(sum(p.teacher_rows + p.teacher.in_features for p in pairs))


def _packed_bytes(numbers: int) -> int:
    """So many numbers of four bytes as base64."""
    return numbers * 4 * 4 // 3


def _read_bytes(
    teacher: Model,
    student: Model | None,
    pairs: Sequence[Pair],
    embeddings: bool,
    crossed: bool,
    masks: bool,
    listed: bool,
    uses: Sequence[int],
    slots: int,
) -> int:
    sizes = [sum(p.bytes for p in layer.values()) for layer in teacher.checkpoint.layers]
    kept = turns(uses, slots)  # those are still in memory where the order turns round
    layers = sum(sizes[i] for i, held in zip(uses, kept, strict=True) if held is None)
    ends = (teacher.head or teacher.embedding).bytes + teacher.embedding.bytes
    item = DTYPE_BYTES[(teacher.checkpoint.dtypes() or ["F32"])[0]]
    windows = sum(pair.read_elements(crossed=crossed, masks=masks) for pair in pairs) * item
    windows *= student.layers if student else 0
    if embeddings and student:
        width = (teacher if listed else student).hidden_size  # with the channels between
        windows += 2 * student.embedding.shape[0] * width * item
        ends += teacher.embedding.bytes + (teacher.head or teacher.embedding).bytes
    return layers + ends + windows
