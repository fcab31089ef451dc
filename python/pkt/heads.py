"""Whole attention heads: how a student's groups of heads lie in a teacher's, from headers alone.

A group is one key-value head and the query heads that read it. Where the student has more groups
than the teacher, the teacher's are split: each kv head is repeated, its query heads shared out in
order. Rotary embeddings turn dims i and i + R/2 of a head together, R the dims that turn (all of
them, or by ``partial_rotary_factor`` the first ones), so a shorter head takes whole pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pkt.models import Model
from pkt.records import Projection

READERS = ("q", "k", "v", "gate", "up")  #: their columns are channels of the residual stream
WRITERS = ("o", "down")  #: their rows are
ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")

# Dims 2i and 2i + 1 turn together.
_INTERLEAVED = {"cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium", "moonshine"}
_PARTIAL = {"gpt_neox": 0.25, "nemotron": 0.5, "persimmon": 0.5, "phi": 0.5, "stablelm": 0.25,
            "glm": 0.5, "glm4": 0.5}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one layer: ``groups`` times one kv head and ``size`` query heads of ``dim``."""

    groups: int
    size: int
    dim: int
    rotary: int  #: leading dims of a head that turn, in pairs i and i + rotary/2

    @property
    def query(self) -> int:
        """Query heads in all."""
        return self.groups * self.size


def heads_of(model: Model) -> Heads:
    """The heads as they are stored."""
    factors = _rotary_factors(model)
    rotary = int(model.head_dim * factors[0])
    return Heads(model.kv_heads, model.heads // max(1, model.kv_heads), model.head_dim, rotary)


def kv_splits(teacher: Model, student: Model) -> int:
    """How often each kv head of the teacher is repeated to make enough groups for the student.

    1 where it has enough. Otherwise groups become the smallest that divide the teacher's and still
    hold the student's query heads; there may be too few of them even so (see `head_problems`).
    """
    theirs, ours = heads_of(teacher), heads_of(student)
    if ours.groups <= theirs.groups:
        return 1
    sizes = (size for size in range(ours.size, theirs.size + 1) if theirs.size % size == 0)
    return theirs.size // next(sizes, theirs.size)


def split_heads(teacher: Model, student: Model) -> Heads:
    """The teacher's heads, its groups split as `kv_splits` says."""
    theirs, splits = heads_of(teacher), kv_splits(teacher, student)
    return Heads(theirs.groups * splits, theirs.size // splits, theirs.dim, theirs.rotary)


def structure_problems(
    teacher: Model, student: Model, pairs: Iterable[tuple[str, Projection, Projection]]
) -> list[str]:
    """What forbids cutting a coherent sub-network, one line each.

    Args:
        teacher: larger model.
        student: smaller model.
        pairs: key, student projection and teacher projection of each wanted matrix.

    """
    wanted = list(pairs)
    problems = [
        f"{key}: --select consistent does not know whether it reads or writes the residual "
        "stream; leave it out with --targets"
        for key, ours, _ in wanted
        if ours.role not in READERS + WRITERS
    ]
    problems += _shape_problems("student", student, [(key, ours) for key, ours, _ in wanted])
    problems += _shape_problems("teacher", teacher, [(key, theirs) for key, _, theirs in wanted])
    roles = {ours.role for _, ours, _ in wanted}
    if roles & {*ATTENTION}:
        problems += head_problems(teacher, student, turning=bool(roles & {"q", "k"}))
    return problems


def head_problems(teacher: Model, student: Model, *, turning: bool = True) -> list[str]:
    """Why the student's heads do not lie in the teacher's, one line each.

    Args:
        teacher: larger model.
        student: smaller model.
        turning: whether q or k, the matrices that rotary embeddings turn, are wanted.

    """
    theirs, ours = heads_of(teacher), heads_of(student)
    cut, problems = split_heads(teacher, student), []
    if cut.size < ours.size:
        problems.append(
            f"heads: the teacher has {cut.size} query heads a kv head, the student {ours.size}; "
            "--select consistent keeps whole groups and needs as many in each"
        )
    elif cut.groups < ours.groups:
        problems.append(
            f"heads: the teacher's make {cut.groups} groups of {cut.size} query heads, the student "
            f"has {ours.groups} of {ours.size}; --select consistent needs as many groups"
        )
    if theirs.dim < ours.dim:
        problems.append(
            f"heads: a head of the teacher has {theirs.dim} dims, the student's {ours.dim}; "
            "--select consistent needs as many"
        )
    elif theirs.dim > ours.dim and turning:
        problems += _rotary_problems(teacher, student)
    return problems


def _rotary_problems(teacher: Model, student: Model) -> list[str]:
    """Heads of different size take pairs of dims: they must be known, even, and enough."""
    problems = [
        f"heads: {model.head_dim} dims a head: which of them '{model.family}' turns together is "
        "not known to --select consistent, so it cannot make heads shorter"
        for model in (teacher, student)
        if model.family in _INTERLEAVED or len({*_rotary_factors(model)}) > 1
    ]
    theirs, ours = heads_of(teacher), heads_of(student)
    rest = theirs.dim - theirs.rotary, ours.dim - ours.rotary
    if ours.rotary % 2 or theirs.rotary % 2 or theirs.rotary < ours.rotary or rest[0] < rest[1]:
        problems.append(
            f"heads: the teacher turns {theirs.rotary} of a head's {theirs.dim} dims, the student "
            f"{ours.rotary} of {ours.dim}; --select consistent takes whole pairs, and neither more "
            "turned nor more still dims than there are"
        )
    return problems


def _shape_problems(side: str, model: Model, wanted: list[tuple[str, Projection]]) -> list[str]:
    """Matrices that are not what their role and the configuration say."""
    heads = heads_of(model)
    inner = {"q": heads.query * heads.dim, "o": heads.query * heads.dim}
    inner |= dict.fromkeys("kv", heads.groups * heads.dim)
    widths = {
        p.in_features if p.role == "down" else p.out_features
        for _, p in wanted
        if p.role in FEED_FORWARD
    }
    neurons = min(widths, default=0)
    problems = []
    for key, p in wanted:
        if p.role not in READERS + WRITERS:
            continue
        found = (p.out_features, p.in_features)
        within = inner.get(p.role, neurons)
        expected = (model.hidden_size, within) if p.role in WRITERS else (within, model.hidden_size)
        if found != expected:
            problems.append(
                f"{key}: --select consistent expects shape {expected} of the {side}'s "
                f"{p.role} projection, found {found}"
            )
    return problems


def _rotary_factors(model: Model) -> list[float]:
    """The share of a head's dims that turns; more than one where kinds of layers differ."""
    config = model.config
    held = config.get("rope_parameters") or {}
    kinds = [entry for entry in held.values() if isinstance(entry, dict)] or [held]
    default = config.get("partial_rotary_factor") or config.get("rotary_pct")
    default = default or _PARTIAL.get(model.family, 1.0)
    return [float(kind.get("partial_rotary_factor") or default) for kind in kinds]
