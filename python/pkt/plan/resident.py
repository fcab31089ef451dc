"""What a run holds whose teacher stays in memory beside the student that learns from it.

Before, where layers are chosen by attribution or a map is made of both heads, it streams the
teacher as `pkt.plan.states` counts; the larger of the two binds. Of the student its weights are
counted, as where it trains alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import LOGIT_ELEMENTS, MIB
from pkt.models import Model
from pkt.plan.forward import forward_parts
from pkt.plan.sizes import (
    BASE_BYTES,
    DEVICE_BASE_BYTES,
    is_native,
    kept_products,
    total_bytes,
)
from pkt.records import Plan, PlanPart


def make_resident_plan(
    streamed: Plan,
    teacher: Model,
    student: Model,
    *,
    dtypes: tuple[str, str],
    lengths: Sequence[int],
    kept: int,
    map_bytes: int = 0,
    logits: bool = True,
    attributed: bool = False,
) -> Plan:
    """The plan of both models in memory.

    Args:
        streamed: the plan of what is streamed before: attribution and maps.
        teacher: larger model.
        student: smaller model.
        dtypes: "F32" or "BF16": the teacher's, the student's.
        lengths: tokens of each text.
        kept: bytes of targets in memory at once, at most.
        map_bytes: of M; 0: nothing is mapped.
        logits: whether the teacher's head is used.
        attributed: whether layers are chosen by attribution.

    """
    items = [DTYPE_BYTES[dtype] for dtype in dtypes]
    layer = max(teacher.checkpoint.layers, key=lambda pieces: sum(p.bytes for p in pieces.values()))
    weights = PlanPart("teacher", elements(teacher) * items[0], f"{dtypes[0]}, all of it")
    pupil = PlanPart("student's weights", elements(student) * items[1], dtypes[1])
    used = forward_parts(teacher, 1, dtypes[0], max(lengths))[1]
    if logits:
        used.append(PlanPart("logits", LOGIT_ELEMENTS * (2 * items[0] + 14)))
    used.append(PlanPart("targets in use", kept))
    if map_bytes:
        used.append(PlanPart("map, float32", map_bytes))
    parts = [PlanPart("torch, transformers, peft", BASE_BYTES), weights, pupil, *used]
    if not is_native(layer, dtypes[0]):
        ends = (teacher.embedding, teacher.head or teacher.embedding)
        largest = max(sum(p.bytes for p in layer.values()), *(piece.bytes for piece in ends))
        parts.append(PlanPart("weights as stored", largest, "while they are read"))
    kinds = len({p.shape for p in layer.values() if len(p.shape) == 2}) + 2
    parts += kept_products(dtypes[0], len(set(lengths)), kinds)
    before = streamed.parts if attributed or map_bytes else ()
    least = max(total_bytes(parts), streamed.smallest_bytes if before else 0)
    return replace(
        streamed,
        parts=tuple(max((parts, before), key=total_bytes)),
        smallest_bytes=-(-least // MIB) * MIB,
        # Of a stream's last reading all of the teacher is kept.
        spool_bytes=streamed.spool_bytes if attributed else 0,
        record_bytes=0,
        passes=3 if attributed else 1,
        device_parts=tuple(
            max(
                ([PlanPart("libraries", DEVICE_BASE_BYTES), weights, pupil, *used],
                 streamed.device_parts if before else ()),
                key=total_bytes,
            )
        ),
    )  # fmt: skip


def elements(model: Model) -> int:
    """Numbers that a model's weights are; a head that is tied is the embedding's."""
    pieces = [p for layer in model.checkpoint.layers for p in layer.values()]
    return sum(p.elements for p in (*pieces, *model.checkpoint.outer.values()))
