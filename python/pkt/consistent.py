"""``--select consistent``: what is cut out of the teacher is a small transformer of its own.

Over scores S, whose row and column sums each layer's record holds (exact totals, rounded once):

1. Residual stream: channel c scores Σ S over the kept layers, in column c of q, k, v, gate and up
   and in row c of o and down; the D_S highest make ONE set for the whole model.
2. Heads, in each layer: the groups (`pkt.heads`) of highest Σ S over their rows of q, k, v and
   columns of o; in each of them the query heads of highest Σ S. Where the student's heads are
   shorter: in each kept group, the RoPE pairs of highest Σ S over its k head and kept q heads, and
   the dims of highest Σ S over its v head and their columns of o.
3. FFN neurons, in each layer: row n of gate and up with column n of down; the F_S highest.

Every set ascends; ties go to the lower index. A matrix that is not wanted has no vote. All sums are
in float64, taken in one order or correctly rounded (``math.fsum``): the same anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkt.heads import ATTENTION, FEED_FORWARD, READERS, Heads
from pkt.projections import Pair
from pkt.records import Window

Vector = NDArray[np.float64]
Sums = tuple[Vector, Vector]  #: Σ S of each row and of each column of a logical matrix
Dims = tuple[tuple[int, ...], ...]  #: within a head, for each kept group


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What one student layer takes; empty where no wanted matrix has it."""

    groups: tuple[int, ...]  #: kv heads, as repeated
    heads: tuple[int, ...]  #: query heads
    rope_dims: Dims  #: of q and k
    value_dims: Dims  #: of v and o
    neurons: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Subnetwork:
    """The index sets of the whole model, all in the teacher's logical matrices."""

    residual: tuple[int, ...]
    layers: tuple[LayerPart, ...]  #: one each student layer
    head_dim: int  #: the teacher's
    shorter: bool  #: the student's heads are

    def as_json(self) -> dict[str, Any]:
        """The manifest's entry: ``residual``, then lists with one entry each student layer."""
        found: dict[str, Any] = {
            "residual": list(self.residual),
            "kv_groups": [list(part.groups) for part in self.layers],
            "heads": [list(part.heads) for part in self.layers],
            "neurons": [list(part.neurons) for part in self.layers],
        }
        if self.shorter:
            found["rope_dims"] = [[list(dims) for dims in part.rope_dims] for part in self.layers]
            found["value_dims"] = [[list(dims) for dims in part.value_dims] for part in self.layers]
        return found

    def indices(self, layer: int, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Chosen rows and columns of a student layer's matrix of that role."""
        part = self.layers[layer]
        if role in FEED_FORWARD:
            within = part.neurons
        else:
            dims = part.rope_dims if role in ("q", "k") else part.value_dims
            size = len(part.heads) // len(part.groups)
            heads = part.groups if role in ("k", "v") else part.heads
            each = 1 if role in ("k", "v") else size
            within = tuple(
                head * self.head_dim + dim
                for place, head in enumerate(heads)
                for dim in dims[place // each]
            )
        return (within, self.residual) if role in READERS else (self.residual, within)


def choose_subnetwork(
    pairs: Sequence[Pair],
    sums: Iterable[Mapping[str, Sums]],
    teacher: Heads,
    student: Heads,
) -> Subnetwork:
    """The index sets of highest scores.

    Args:
        pairs: wanted matrices, known to fit (`pkt.heads.structure_problems`).
        sums: of each kept teacher layer in order, by key of ``pairs``; each is looked at once.
        teacher: its heads, groups split as the student needs.
        student: its heads.

    """
    pair = pairs[0].student
    width = pair.in_features if pair.role in READERS else pair.out_features
    total: Vector | float = 0.0
    parts = []
    for layer in sums:
        for key, role in ((p.key, p.student.role) for p in pairs):
            total = total + layer[key][role in READERS]
        parts.append(_layer(pairs, layer, teacher, student))
    return Subnetwork(
        residual=_highest(np.asarray(total), width),
        layers=tuple(parts),
        head_dim=teacher.dim,
        shorter=teacher.dim > student.dim,
    )


def subnetwork_window(
    network: Subnetwork, layer: int, pair: Pair, sums: Sums, teacher: str
) -> Window:
    """The window of one matrix.

    Its score is the smaller of Σ S over the chosen rows and over the chosen columns: the scores
    where they cross are gone when the choice is made, and their sum is at most this.

    Args:
        network: what was chosen.
        layer: student layer.
        pair: matrix.
        sums: of the teacher's matrix.
        teacher: full name of the teacher's projection.

    """
    chosen = network.indices(layer, pair.student.role)
    score = min(math.fsum(of[list(at)]) for of, at in zip(sums, chosen, strict=True))
    return Window(teacher, score, *chosen, None, pair.kv_repeat, crossed=True)


def channel_window(network: Subnetwork, sums: Vector, rows: int, teacher: str) -> Window:
    """The residual channels of an embedding or head with column scores ``sums``; every row."""
    score = math.fsum(sums[list(network.residual)])
    span = (0, rows)
    return Window(teacher, score, span, network.residual, crossed=True, every_row=True)


def _layer(
    pairs: Sequence[Pair], sums: Mapping[str, Sums], teacher: Heads, student: Heads
) -> LayerPart:
    inner = {p.student.role: sums[p.key][p.student.role not in READERS] for p in pairs}
    neurons: tuple[int, ...] = ()
    if voting := [inner[role] for role in FEED_FORWARD if role in inner]:
        wanted = next(p.student for p in pairs if p.student.role in FEED_FORWARD)
        width = wanted.in_features if wanted.role == "down" else wanted.out_features
        neurons = _highest(np.sum(voting, axis=0), width)
    if not any(role in inner for role in ATTENTION):
        return LayerPart((), (), (), (), neurons)
    q, o = (inner.get(r, np.zeros(teacher.query * teacher.dim)) for r in "qo")
    k, v = (inner.get(r, np.zeros(teacher.groups * teacher.dim)) for r in "kv")
    by_group = [each.reshape(teacher.groups, -1, teacher.dim) for each in (q, k, v, o)]
    groups = _highest(_totals(np.concatenate(by_group, axis=1)), student.groups)
    q, k, v, o = by_group
    heads, rope_dims, value_dims = [], [], []
    for group in groups:
        kept = _highest(_totals(np.stack([q[group], o[group]], axis=1)), student.size)
        heads += [group * teacher.size + head for head in kept]
        turned = _totals(np.concatenate([q[group][list(kept)], k[group]]).T)
        valued = _totals(np.concatenate([o[group][list(kept)], v[group]]).T)
        rope_dims.append(_rope_dims(turned, teacher, student))
        value_dims.append(_highest(valued, student.dim))
    voted = tuple(heads) if "q" in inner or "o" in inner else ()
    return LayerPart(groups, voted, tuple(rope_dims), tuple(value_dims), neurons)


def _rope_dims(scores: Vector, teacher: Heads, student: Heads) -> tuple[int, ...]:
    """Whole pairs of the dims that turn, first halves before second ones; then still dims."""
    if teacher.dim == student.dim:
        return tuple(range(teacher.dim))
    half = teacher.rotary // 2
    pairs = _highest(scores[:half] + scores[half : 2 * half], student.rotary // 2)
    still = _highest(scores[2 * half :], student.dim - student.rotary)
    second = tuple(half + pair for pair in pairs)
    return (*pairs, *second, *(2 * half + dim for dim in still))


def _totals(scores: NDArray[np.float64]) -> Vector:
    """Σ over all axes but the first, correctly rounded."""
    return np.array([math.fsum(each.ravel()) for each in scores])


def _highest(scores: Vector, count: int) -> tuple[int, ...]:
    """The ``count`` highest, ascending; ties: the lower index."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(sorted(order.tolist()))
