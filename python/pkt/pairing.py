"""Which teacher layer speaks to which student layer; layers are counted from 1 here.

Gu et al., "Beyond Neural Incompatibility", arXiv 2510.24208. By the floor rule student layer k
listens to teacher layer ``ℓ_k = max(1, ⌊k L_T / L_S⌋)``: the last to the last, order kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pkt.errors import IncompatibleError, UsageError
from pkt.records import LayerPair


def floor_pairs(teacher_layers: int, student_layers: int) -> tuple[LayerPair, ...]:
    """A teacher layer for each student layer k: ``max(1, ⌊k L_T / L_S⌋)``.

    Raises:
        IncompatibleError: the teacher has fewer layers than the student.

    """
    _require_deeper(teacher_layers, student_layers)
    return tuple(
        LayerPair(max(1, k * teacher_layers // student_layers), k)
        for k in range(1, student_layers + 1)
    )


def critical_pairs(
    critical: Iterable[int], teacher_layers: int, student_layers: int
) -> tuple[LayerPair, ...]:
    """The pairs of the floor rule that critical teacher layers lead to.

    Layer ℓ⋆ goes to ``k† = min{k : ℓ_k ≥ ℓ⋆}``, and the pair is (ℓ_k†, k†): the layer that the
    floor rule maps gives the target, not ℓ⋆ itself. Layers that lead to one pair share it.

    Args:
        critical: teacher layers, from 1.
        teacher_layers: L_T.
        student_layers: L_S.

    Raises:
        UsageError: a layer that the teacher does not have.
        IncompatibleError: the teacher has fewer layers than the student.

    """
    pairs, found = floor_pairs(teacher_layers, student_layers), set()
    for layer in critical:
        _require_layer("teacher", layer, teacher_layers)
        found.add(next((p.student for p in pairs if p.teacher >= layer), student_layers))
    return tuple(pairs[student - 1] for student in sorted(found))


def interpolated_pairs(teacher_layers: int, student_layers: int) -> tuple[LayerPair, ...]:
    """For each student layer two neighbouring teacher layers and how they are mixed.

    ``u = k L_T / L_S``, ``a = clip(⌊u⌋, 1, L_T − 1)``, ``λ = clip(u − a, 0, 1)``, and the state is
    ``(1 − λ) h_a + λ h_{a+1}``, mixed before it is mapped.

    Raises:
        IncompatibleError: the teacher has fewer layers than the student.

    """
    _require_deeper(teacher_layers, student_layers)
    pairs = []
    for k in range(1, student_layers + 1):
        lower = min(max(k * teacher_layers // student_layers, 1), max(teacher_layers - 1, 1))
        mix = min(max((k * teacher_layers - lower * student_layers) / student_layers, 0.0), 1.0)
        pairs.append(LayerPair(lower, k, mix))
    return tuple(pairs)


def attributed_pairs(
    scores: Sequence[float], teacher_layers: int, student_layers: int
) -> tuple[LayerPair, ...]:
    """For each student layer k the teacher layer of highest score among ``ℓ_{k−1} + 1 … ℓ_k``.

    ``ℓ_0 = 0``; of equal scores the lower layer, and ``ℓ_k`` itself where the range is empty.

    Args:
        scores: A of each teacher layer.
        teacher_layers: L_T.
        student_layers: L_S.

    Raises:
        IncompatibleError: the teacher has fewer layers than the student.

    """
    found, before = [], 0
    for pair in floor_pairs(teacher_layers, student_layers):
        within = range(before + 1, pair.teacher + 1)
        best = max(within, key=lambda layer: (scores[layer - 1], -layer), default=pair.teacher)
        found.append(LayerPair(best, pair.student))
        before = pair.teacher
    return tuple(found)


def highest_layers(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` layers of highest score, the highest first; of equal ones the lower layer."""
    order = sorted(range(1, len(scores) + 1), key=lambda layer: (-scores[layer - 1], layer))
    return tuple(order[:count])


def span_starts(
    pairs: Sequence[LayerPair], teacher_layers: int, student_layers: int
) -> tuple[LayerPair | None, ...]:
    """For each pair where the teacher's part of what student layer k adds begins.

    The pair of student layer k − 1: the one among ``pairs`` or, where that layer has none, that of
    the floor rule (interpolated if ``pairs`` are), if it lies below. ``None``: before layer 1.

    Raises:
        UsageError: nothing lies between where a span begins and its end.

    """
    rule = interpolated_pairs if any(pair.mix for pair in pairs) else floor_pairs
    known = {pair.student: pair for pair in rule(teacher_layers, student_layers)}
    known |= {pair.student: pair for pair in pairs}
    named = {pair.student for pair in pairs}
    found: list[LayerPair | None] = []
    for pair in pairs:
        start = known.get(pair.student - 1)
        if start and start.student not in named and start.teacher >= pair.teacher:
            lower = pair.teacher - 1
            start = LayerPair(lower, start.student) if lower else None
        if start and start.teacher + start.mix >= pair.teacher + pair.mix:
            raise UsageError(
                f"pairs {start.teacher}:{start.student} and {pair.teacher}:{pair.student}: "
                f"expected a deeper teacher layer for the deeper student layer: the span between "
                "them is empty",
                "take other --pairs, or another --interface than span",
            )
        found.append(start)
    return tuple(found)


def sources(pair: LayerPair, interface: str, start: LayerPair | None = None) -> dict[int, float]:
    """What a pair's target is the sum of: factors by boundary or, of sub-layers, by layer.

    Boundary l lies behind layer l, 0 before the first: ``hidden`` is h_l, ``block``
    ``h_l − h_{l−1}``, ``span`` ``h_l − h_l'``, ``mlp`` and ``attn`` what layer l's adds. Of a pair
    with mix λ each is ``(1 − λ)`` times that of l and λ times that of ``l + 1``.

    Args:
        pair: of layers.
        interface: mlp, attn, block, hidden or span.
        start: of a span, as `span_starts` gives it; ``None``: before the first layer.

    """
    found: dict[int, float] = {}

    def add(pair: LayerPair | None, factor: float, shift: int = 0) -> None:
        mixed = [(0, 1.0)] if pair is None else [(0, 1 - pair.mix), (1, pair.mix)]
        for step, share in mixed:
            at = (pair.teacher if pair else 0) + step + shift
            found[at] = found.get(at, 0.0) + factor * share

    add(pair, 1.0)
    if interface == "block":
        add(pair, -1.0, shift=-1)
    elif interface == "span":
        add(start, -1.0)
    return {at: factor for at, factor in sorted(found.items()) if factor}


def all_sources(
    pairs: Sequence[LayerPair], interface: str, teacher_layers: int, student_layers: int
) -> list[dict[int, float]]:
    """`sources` of each pair; spans begin where `span_starts` says."""
    starts: Sequence[LayerPair | None] = [None] * len(pairs)
    if interface == "span":
        starts = span_starts(pairs, teacher_layers, student_layers)
    return [sources(pair, interface, start) for pair, start in zip(pairs, starts, strict=True)]


def most_kept(terms: Sequence[Mapping[int, float]], *, sub_layers: bool) -> int:
    """The most sources whose states lie on the disk at once, of targets made as soon as they can.

    Args:
        terms: of each pair, as `sources` gives them.
        sub_layers: whether what a layer adds is meant, which is kept even if used at once.

    """
    most = 0
    for at in range(max(max(each) for each in terms) + 1):
        live = {
            source
            for each in terms
            for source in each
            if max(each) >= at
            and (source < at or (source == at and (sub_layers or max(each) > at)))
        }
        most = max(most, len(live))
    return most


def given_pairs(text: str, teacher_layers: int, student_layers: int) -> tuple[LayerPair, ...]:
    """The pairs of ``T:S,T:S,…``, by student layer.

    Raises:
        UsageError: not of this form, out of range, or a student layer named twice.

    """
    found: dict[int, int] = {}
    for part in text.split(","):
        teacher, colon, student = part.strip().partition(":")
        if not colon or not _is_number(teacher) or not _is_number(student):
            raise UsageError(
                f"--pairs {text}: expected TEACHER:STUDENT layers, counted from 1, found {part!r}",
                "for example --pairs 5:3,10:6",
            )
        _require_layer("teacher", int(teacher), teacher_layers)
        _require_layer("student", int(student), student_layers)
        if int(student) in found:
            raise UsageError(f"--pairs {text}: student layer {student} stands there twice")
        found[int(student)] = int(teacher)
    return tuple(LayerPair(teacher, student) for student, teacher in sorted(found.items()))


def unlike_attention(
    pairs: Sequence[LayerPair], teacher_kinds: Sequence[str], student_kinds: Sequence[str]
) -> tuple[LayerPair, ...]:
    """The pairs of which one layer's attention slides over a window and the other's does not.

    Args:
        pairs: of layers, from 1.
        teacher_kinds: attention of each teacher layer, such as "sliding_attention".
        student_kinds: of each student layer.

    """
    return tuple(p for p in pairs if teacher_kinds[p.teacher - 1] != student_kinds[p.student - 1])


def _require_deeper(teacher_layers: int, student_layers: int) -> None:
    if teacher_layers < student_layers:
        raise IncompatibleError(
            f"layers: expected a teacher with at least the student's {student_layers}, "
            f"found {teacher_layers}",
            "swap teacher and student, or take a deeper teacher",
        )


def _require_layer(role: str, layer: int, layers: int) -> None:
    if not 1 <= layer <= layers:
        raise UsageError(f"{role} layer {layer}: expected 1 to {layers}")


def _is_number(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()
