"""What one pass forward will hold, read and write: for a teacher's targets, for a pair's report.

As `pkt.plan.extraction`, without gradients.
"""

from __future__ import annotations

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import LOGIT_ELEMENTS, MIB
from pkt.models import Model
from pkt.plan.sizes import (
    BASE_BYTES,
    CALLS_BYTES,
    attention_bytes,
    is_eager,
    is_native,
    kept_products,
    total_bytes,
    widened,
)
from pkt.records import AlignPlan, DiskNeed, Plan, PlanPart, Room


def make_forward_plan(
    teacher: Model,
    *,
    dtype: str,
    tokens: int,
    rows: int,
    shapes: int,
    answers: int,
    results: int,
    held: int,
    budget: tuple[int, str],
    room: Room | None = None,
    logits: bool = True,
) -> Plan:
    """The plan of one pass forward, which leaves targets.

    Args:
        teacher: larger model.
        dtype: computed in, "F32" or "BF16".
        tokens: of all examples.
        rows: of the largest batch of examples, as `pkt.batches` has them.
        shapes: number of different batches, by examples and rows.
        answers: answer tokens of all examples.
        results: bytes of the targets.
        held: bytes of them in memory at once, at most.
        budget: bytes allowed, and where that number comes from.
        room: what the disks have free; ``None``: enough.
        logits: whether the head is used.

    Returns:
        the plan with read-ahead (two slots) if that fits, else with one slot.

    """
    item = DTYPE_BYTES[dtype]
    layer = max(teacher.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    matrices = [p for p in layer.values() if len(p.shape) == 2]
    head = teacher.head or teacher.embedding
    head_bytes = head.elements * (DTYPE_BYTES[head.dtype] + (0 if head.dtype == dtype else item))
    # Of each shape, those with the matrices of a layer, of its attention, and with the head.
    kinds = len({piece.shape for piece in matrices}) + 2

    def parts(slots: int) -> tuple[PlanPart, ...]:
        weights, used = forward_parts(teacher, slots, dtype, rows)
        shared = [PlanPart("torch, transformers, peft", BASE_BYTES), *weights]
        shared += kept_products(dtype, shapes, kinds)
        forward = [*shared, *used]
        ends = [*shared]
        if logits:
            ends.append(PlanPart("head", head_bytes))
            ends.append(PlanPart("logits", LOGIT_ELEMENTS * (2 * item + 14)))
        ends.append(PlanPart("targets of one file", 3 * held, "as rows, joined, as bytes"))
        return tuple(max((forward, ends), key=total_bytes))

    sizes = {slots: total_bytes(parts(slots)) for slots in (2, 1)}
    slots = next((count for count, size in sizes.items() if size <= budget[0]), 1)
    read = sum(p.bytes for pieces in teacher.checkpoint.layers for p in pieces.values())
    flop = 2 * tokens * sum(p.elements for p in matrices) * teacher.layers
    spool = 2 * tokens * teacher.hidden_size * item  # the inputs of a layer and its outputs
    return Plan(
        budget_bytes=budget[0],
        budget_source=budget[1],
        parts=parts(slots),
        smallest_bytes=-(-sizes[1] // MIB) * MIB,
        slots=slots,
        scores="layer",
        read_bytes=read + head.bytes * logits + teacher.embedding.bytes,
        spool_bytes=spool,
        record_bytes=results,
        adapter_bytes=0,
        flop=flop + 2 * answers * head.elements,
        room=room,
        least_spool=(1, spool),
        passes=1,
        extracts=False,
    )


def make_align_plan(
    teacher: Model,
    student: Model,
    *,
    dtypes: tuple[str, str],
    maps: int,
    tokens: tuple[int, int],
    rows: tuple[int, int],
    states: int,
    lens_states: int,
    chunk_elements: int,
    budget: tuple[int, str],
    disk: tuple[str, int] | None = None,
) -> AlignPlan:
    """The plan of a pair's quality report; pairs of numbers are the teacher's and the student's.

    Args:
        teacher: larger model.
        student: smaller model.
        dtypes: computed in, "F32" or "BF16".
        maps: that are compared.
        tokens: of all texts.
        rows: of the largest batch of texts.
        states: most positions whose states are kept.
        lens_states: most states, of all layers together, whose logits are compared.
        chunk_elements: of a head, read at once.
        budget: bytes allowed, and where that number comes from.
        disk: a folder, and what its disk has free; ``None``: not asked for.

    """
    models = (teacher, student)
    wide, narrow = teacher.hidden_size, student.hidden_size
    base = PlanPart("torch, transformers", BASE_BYTES)
    kept = PlanPart("maps, float32", 4 * maps * wide * narrow)
    grams = 8 * (3 * wide * wide + 3 * narrow * narrow + 2 * wide * narrow)
    heads = (
        base, kept, PlanPart("Gram matrices, factors", grams, "float64"),
        PlanPart("chunks of the heads", 48 * chunk_elements, "float64"),
    )  # fmt: skip
    logits = PlanPart("logits", 24 * LOGIT_ELEMENTS)
    lens = (
        base, kept, logits, PlanPart("chunks of the heads", 48 * chunk_elements, "float64"),
        PlanPart("states", 4 * lens_states * (wide + maps * narrow) + 20 * states * wide),
    )  # fmt: skip
    kernels = PlanPart("kernels of the layers", 8 * states * states * (2 * student.layers + 3))
    alike = (base, kept, kernels, PlanPart("states", 12 * states * wide))

    def parts(slots: int) -> tuple[PlanPart, ...]:
        sweeps = [
            (base, kept, *weights, *used)
            for model, dtype, most in zip(models, dtypes, rows, strict=True)
            for weights, used in [forward_parts(model, slots, dtype, most)]
        ]
        return tuple(max((heads, lens, alike, *sweeps), key=total_bytes))

    slots = next((slots for slots in (2, 1) if total_bytes(parts(slots)) <= budget[0]), 1)
    items = [DTYPE_BYTES[dtype] for dtype in dtypes]
    on_disk = sum(
        item * model.hidden_size * (states * (model.layers + 1) + 3 * count)
        for model, item, count in zip(models, items, tokens, strict=True)
    )
    ends = sum((m.head or m.embedding).bytes for m in models)
    passes = 4 if maps else 0  # Gram matrices, v1's map, embeddings, logits
    return AlignPlan(
        budget_bytes=budget[0],
        budget_source=budget[1],
        parts=parts(slots),
        smallest_bytes=-(-total_bytes(parts(1)) // MIB) * MIB,
        slots=slots,
        read_bytes=sum(m.checkpoint.bytes for m in models) + passes * ends,
        disk_bytes=on_disk,
        disk=DiskNeed(disk[0], on_disk, disk[1]) if disk else None,
    )


def forward_parts(
    model: Model, slots: int, dtype: str, rows: int
) -> tuple[list[PlanPart], list[PlanPart]]:
    """What one layer's forward pass holds: weights, and what is made of a batch."""
    layer = max(model.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    item = DTYPE_BYTES[dtype]
    elements = sum(p.elements for p in layer.values() if p.dtype in DTYPE_BYTES)
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    widths = [width for p in layer.values() if len(p.shape) == 2 for width in p.shape]
    activations = rows * (sum(widths) + 8 * model.hidden_size) * item
    activations += attention_bytes(model, rows, rows, item)
    mask = 2 * rows * rows * (item if is_eager(model) else 1)  # sliding and full
    ahead = f"{slots}, {'ahead' if slots > 1 else 'in turn'}"
    weights = [PlanPart("layer slots", slots * slot, ahead)]
    if not is_native(layer, dtype):
        weights.append(PlanPart("weights converted", elements * item, f"to {dtype}"))
    return weights, [
        PlanPart("activations of a batch", activations, f"{rows} tokens"),
        *widened(dtype, rows, widths),
        PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
    ]
