"""What a run will hold, read and write, worked out from headers before anything is read.

Anonymous memory only: mapped and cached pages are the kernel's to take back. Three phases bind:
one layer's sweep, the head with its logits, and the factors; the plan lists the largest. So it
does for the memory of a CUDA device, by the same formulas; there it is an estimate, not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import LOGIT_ELEMENTS, MIB
from pkt.models import Model
from pkt.projections import Pair
from pkt.records import AlignPlan, DiskNeed, Plan, PlanPart, Room
from pkt.schedule import peak_boundaries, schedule, turns

BASE_BYTES = 576 * MIB  # the interpreter, torch, transformers and peft, measured
BLOCK_BYTES = 48 * MIB  # a row block of gradients, and what the matrix product copies for it
HEAP_BYTES = 32 * MIB  # blocks from here on are glibc's own mappings, smaller ones lie in its heap
CALLS_BYTES = 64 * MIB  # masks and position embeddings, at most
DEVICE_BASE_BYTES = 256 * MIB  # of a device: work spaces, code, what fragments; estimated
DEVICE_BLOCK_BYTES = 128 * MIB  # a row block of gradients there, and the head's; estimated
PRODUCT_BYTES = 640 << 10  # what oneDNN keeps of a bfloat16 product of one shape, measured
MOST_PRODUCTS = 1024  # of which it keeps so many
WINDOW_BYTES = 16  # an element: as stored, in float32, and laid out for products from either side


def make_plan(
    teacher: Model,
    student: Model | None,
    pairs: Sequence[Pair],
    *,
    dtype: str,
    rank: int,
    tokens: int,
    longest: int,
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
    elements = sum(p.elements for p in layer.values() if p.dtype in DTYPE_BYTES)
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    converted = 0 if _native(layer, dtype) else elements * item
    head = teacher.head or teacher.embedding
    head_bytes = head.elements * (DTYPE_BYTES[head.dtype] + (0 if head.dtype == dtype else item))
    logits = LOGIT_ELEMENTS * (2 * item + 14)  # in the head's type and in float32, and gradients
    widths = [*(width for p in matrices for width in p.shape), *(8 * [teacher.hidden_size])]
    activations = sum(_kept_bytes(longest * width * item) for width in widths)
    activations += _attention_bytes(teacher, longest, item)
    mask = 2 * longest * longest * (item if _eager(teacher) else 1)  # sliding and full
    adapter = _adapter_bytes(student, pairs, rank, embeddings)
    window = _window_bytes(pairs)
    if embeddings and student:
        window = max(window, student.embedding.elements * WINDOW_BYTES)
    base = PlanPart("torch, transformers, peft", BASE_BYTES)
    records = _sums_bytes(pairs) * teacher.layers if sums else 0
    kept = [PlanPart("sums of every layer", records)] if sums else []
    largest = max((p.elements for p in matrices), default=0)

    def phases(shared: list[PlanPart], matrix: bool, block: int) -> tuple[list[PlanPart], ...]:
        held = largest if matrix else elements
        sweep = [
            *shared,
            PlanPart("scores, float32", 4 * held, "one matrix" if matrix else "one layer"),
            PlanPart("gradient block", block),
            PlanPart("activations of one seed", activations, f"{longest} tokens"),
            PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
        ]
        ends = [*shared, PlanPart("head", head_bytes), PlanPart("logits", logits)]
        if embeddings:
            ends.append(PlanPart("logit gradients of one seed", longest * head.shape[0] * item * 2))
        return sweep, ends

    def parts(slots: int, matrix: bool) -> tuple[PlanPart, ...]:
        shared = [
            base,
            *kept,
            PlanPart(
                "layer slots", slots * slot, f"{slots}, {'ahead' if slots > 1 else 'in turn'}"
            ),
        ]
        if converted:
            shared.append(PlanPart("weights converted", converted, f"to {dtype}"))
        sweep, ends = phases(shared, matrix, BLOCK_BYTES)
        factors = [base, *kept, PlanPart("largest window", window), PlanPart("adapter", adapter)]
        return tuple(max((sweep, ends, factors), key=_total))

    def on_device(matrix: bool) -> tuple[PlanPart, ...]:
        """Of a CUDA device: two layers whatever the slots, which lie in the host's memory."""
        shared = [
            PlanPart("libraries", DEVICE_BASE_BYTES),
            PlanPart("weights", 2 * elements * item, "a layer at work, the next one copied"),
        ]
        if converted:
            stored = max((p.bytes for p in matrices), default=0)
            shared.append(PlanPart("largest weight as stored", stored))
        sweep, ends = phases(shared, matrix, DEVICE_BLOCK_BYTES)
        ends.append(sweep[len(shared)])  # scores: what is allocated there is taken, used or not
        factors = [shared[0], PlanPart("largest window", window)]
        return tuple(max((sweep, ends, factors), key=_total))

    settings = [(2, False), (1, False), (2, True), (1, True)]
    sizes = {s: _total(parts(*s)) for s in settings}
    fitting = [s for s in settings if sizes[s] <= budget[0]]
    smallest = min(settings, key=lambda s: (sizes[s], settings.index(s)))
    slots, matrix = fitting[0] if fitting else smallest
    while slots < teacher.layers and _total(parts(slots + 1, matrix)) <= budget[0]:
        slots += 1
    block = tokens * teacher.hidden_size * item
    crossing = tokens * sum(p.shape[0] + p.shape[1] for p in matrices) * item if matrix else 0
    if masks:
        records += teacher.layers * sum(p.teacher_rows * p.teacher.in_features // 8 for p in pairs)

    def spool(every: int) -> int:
        return peak_boundaries(teacher.layers, every, embeddings) * block + crossing

    choices = range(1, teacher.layers + 1)
    least = min(choices, key=spool) if room else 1
    if every is None:
        free = _spool_room(room, records + adapter)
        every = next((k for k in choices if free is None or spool(k) <= free), least)
    steps = schedule(teacher.layers, every, last=embeddings)
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
        read_bytes=_read_bytes(teacher, student, pairs, embeddings, crossed, sums, uses, slots),
        spool_bytes=spool(every),
        record_bytes=records,
        spool_every=every,
        recomputed_layers=again,
        flop=(4 * teacher.layers + again) * products + 4 * tokens * head.elements,
        adapter_bytes=adapter,
        room=room,
        least_spool=(least, spool(least)),
        device_parts=on_device(matrix),
    )


def make_forward_plan(
    teacher: Model,
    *,
    dtype: str,
    tokens: int,
    longest: int,
    lengths: int,
    answers: int,
    results: int,
    held: int,
    budget: tuple[int, str],
    room: Room | None = None,
) -> Plan:
    """The plan of one pass forward, which leaves targets.

    Args:
        teacher: larger model.
        dtype: computed in, "F32" or "BF16".
        tokens: of all examples.
        longest: tokens of the longest example.
        lengths: number of different lengths that examples have.
        answers: answer tokens of all examples.
        results: bytes of the targets.
        held: bytes of them in memory at once, at most.
        budget: bytes allowed, and where that number comes from.
        room: what the disks have free; ``None``: enough.

    Returns:
        the plan with read-ahead (two slots) if that fits, else with one slot.

    """
    item = DTYPE_BYTES[dtype]
    layer = max(teacher.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    matrices = [p for p in layer.values() if len(p.shape) == 2]
    elements = sum(p.elements for p in layer.values() if p.dtype in DTYPE_BYTES)
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    converted = 0 if _native(layer, dtype) else elements * item
    head = teacher.head or teacher.embedding
    head_bytes = head.elements * (DTYPE_BYTES[head.dtype] + (0 if head.dtype == dtype else item))
    per_token = sum(p.shape[0] + p.shape[1] for p in matrices) + 8 * teacher.hidden_size
    activations = longest * per_token * item + _attention_bytes(teacher, longest, item)
    mask = 2 * longest * longest * (item if _eager(teacher) else 1)  # sliding and full
    # Of each length, those with the matrices of a layer, of its attention, and with the head.
    kinds = len({piece.shape for piece in matrices}) + 2
    products = min(MOST_PRODUCTS, lengths * kinds) * PRODUCT_BYTES if dtype == "BF16" else 0

    def parts(slots: int) -> tuple[PlanPart, ...]:
        note = f"{slots}, {'ahead' if slots > 1 else 'in turn'}"
        shared = [
            PlanPart("torch, transformers, peft", BASE_BYTES),
            PlanPart("layer slots", slots * slot, note),
        ]
        if converted:
            shared.append(PlanPart("weights converted", converted, f"to {dtype}"))
        if products:
            shared.append(PlanPart("products of each length", products, f"{lengths} lengths"))
        forward = [
            *shared,
            PlanPart("activations of one example", activations, f"{longest} tokens"),
            PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
        ]
        ends = [
            *shared,
            PlanPart("head", head_bytes),
            PlanPart("logits", LOGIT_ELEMENTS * (2 * item + 14)),
            PlanPart("targets of one file", 3 * held, "as rows, joined, as bytes"),
        ]
        return tuple(max((forward, ends), key=_total))

    sizes = {slots: _total(parts(slots)) for slots in (2, 1)}
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
        read_bytes=read + head.bytes + teacher.embedding.bytes,
        spool_bytes=spool,
        record_bytes=results,
        adapter_bytes=0,
        flop=flop + 2 * answers * head.elements,
        room=room,
        least_spool=(1, spool),
        passes=1,
    )


def make_align_plan(
    teacher: Model,
    student: Model,
    *,
    dtypes: tuple[str, str],
    maps: int,
    tokens: tuple[int, int],
    longest: tuple[int, int],
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
        longest: tokens of the longest text.
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
            (base, kept, *_forward_parts(model, slots, dtype, most))
            for model, dtype, most in zip(models, dtypes, longest, strict=True)
        ]
        return tuple(max((heads, lens, alike, *sweeps), key=_total))

    slots = next((slots for slots in (2, 1) if _total(parts(slots)) <= budget[0]), 1)
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
        smallest_bytes=-(-_total(parts(1)) // MIB) * MIB,
        slots=slots,
        read_bytes=sum(m.checkpoint.bytes for m in models) + passes * ends,
        disk_bytes=on_disk,
        disk=DiskNeed(disk[0], on_disk, disk[1]) if disk else None,
    )


def _forward_parts(model: Model, slots: int, dtype: str, longest: int) -> list[PlanPart]:
    """What one layer's forward pass holds."""
    layer = max(model.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    item, elements = DTYPE_BYTES[dtype], sum(p.elements for p in layer.values())
    slot = sum(p.bytes for p in layer.values()) + 4096 * (len(layer) + 1)
    widths = sum(sum(p.shape) for p in layer.values() if len(p.shape) == 2)
    activations = longest * (widths + 8 * model.hidden_size) * item
    mask = 2 * longest * longest * (item if _eager(model) else 1)
    converted = 0 if _native(layer, dtype) else elements * item
    return [
        PlanPart("layer slots", slots * slot, f"{slots}, {'ahead' if slots > 1 else 'in turn'}"),
        *([PlanPart("weights converted", converted, f"to {dtype}")] if converted else []),
        PlanPart(
            "activations of one text",
            activations + _attention_bytes(model, longest, item),
            f"{longest} tokens",
        ),
        PlanPart("masks and positions", min(CALLS_BYTES, 32 * mask) + mask),
    ]


def _spool_room(room: Room | None, others: int) -> int | None:
    """Bytes that the spool may take; ``None``: as many as it likes."""
    if room is None:
        return None
    return room.spool_free - (others if room.shared else 0)


def _total(parts: Iterable[PlanPart]) -> int:
    return sum(part.bytes for part in parts)


def _eager(teacher: Model) -> bool:
    """Whether transformers runs its eager attention for this family (it has soft caps)."""
    return teacher.family == "gemma2"


def _kept_bytes(tensor: int) -> int:
    """Of an activation of so many bytes and of the gradients beside it.

    The allocator gives the pages of large ones back at once; smaller ones leave gaps in its heap.
    """
    return tensor * 5 // 4 if tensor >= HEAP_BYTES else 2 * tensor


def _attention_bytes(teacher: Model, longest: int, item: int) -> int:
    """What attention keeps of one seed beyond q, k and v.

    Fused attention keeps a few rows of probabilities at a time. A model that caps them (Gemma 2)
    runs transformers' eager code, which keeps whole matrices: logits, capped, softmax in float32.
    """
    if _eager(teacher):
        return longest * longest * teacher.heads * (4 * item + 8)
    return 2 * min(longest, 512) * longest * teacher.heads * item


def _native(layer: object, dtype: str) -> bool:
    """Whether every large tensor can be used where it was read."""
    assert isinstance(layer, dict)
    dtypes = {p.dtype for p in layer.values() if len(p.shape) == 2 and p.dtype in DTYPE_BYTES}
    return dtypes <= ({"F16", "BF16"} if dtype == "BF16" else {dtype})


def _window_bytes(pairs: Sequence[Pair]) -> int:
    """The largest student module while its factors are made."""
    modules: dict[str, int] = {}
    for pair in pairs:
        size = pair.student.out_features * pair.student.in_features
        modules[pair.student.module] = modules.get(pair.student.module, 0) + size
    return WINDOW_BYTES * max(modules.values(), default=0)


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
    return sum(8 * (p.teacher_rows + p.teacher.in_features) * 4 // 3 for p in pairs)


def _read_bytes(
    teacher: Model,
    student: Model | None,
    pairs: Sequence[Pair],
    embeddings: bool,
    crossed: bool,
    listed: bool,
    uses: Sequence[int],
    slots: int,
) -> int:
    sizes = [sum(p.bytes for p in layer.values()) for layer in teacher.checkpoint.layers]
    kept = turns(uses, slots)  # those are still in memory where the order turns round
    layers = sum(sizes[i] for i, held in zip(uses, kept, strict=True) if held is None)
    ends = (teacher.head or teacher.embedding).bytes + teacher.embedding.bytes
    item = DTYPE_BYTES[(teacher.checkpoint.dtypes() or ["F32"])[0]]
    widths = [p.teacher.in_features if crossed else p.student.in_features for p in pairs]
    windows = sum(p.student.out_features * w for p, w in zip(pairs, widths, strict=True)) * item
    windows *= student.layers if student else 0
    if embeddings and student:
        width = (teacher if listed else student).hidden_size  # with the channels between
        windows += 2 * student.embedding.shape[0] * width * item
        ends += teacher.embedding.bytes + (teacher.head or teacher.embedding).bytes
    return layers + ends + windows
