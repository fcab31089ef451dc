"""Which linear projections a decoder layer has, and which of the teacher's feeds the student's.

Everything is read from tensor suffixes, shapes and the configuration. A fused module (Phi-3's
qkv_proj and gate_up_proj, GPT-NeoX's query_key_value) is several logical projections over one
stored matrix; a role (q, k, v, o, gate, up, down) makes two spellings of one idea meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pkt.checkpoint import Piece
from pkt.errors import IncompatibleError, UsageError
from pkt.heads import kv_splits, structure_problems
from pkt.models import Model
from pkt.records import MatchRow, Projection

_ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "dense": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down", "fc1": "up", "fc2": "down",
}  # fmt: skip


_FUSED = {"c_attn", "Wqkv", "W_pack", "query_key_value", "in_proj", "qkv"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One logical student matrix and the teacher matrix that its window is cut from."""

    key: str  #: "self_attn.q_proj", or "self_attn.qkv_proj#q" for a part of a fused module
    student: Projection
    teacher: Projection
    kv_repeat: int  #: how often each kv head of the teacher is repeated; 1: as stored

    @property
    def teacher_rows(self) -> int:
        """Rows of the logical (expanded) teacher matrix."""
        return self.teacher.out_features * self.kv_repeat

    def read_elements(self, *, crossed: bool, masks: bool) -> int:
        """Elements of the teacher's matrix that are read again to cut the student's from it.

        Args:
            crossed: the columns between those that are chosen are read too.
            masks: single weights are chosen: all are read, each stored one once.

        """
        if masks:
            return self.teacher.out_features * self.teacher.in_features
        width = self.teacher.in_features if crossed else self.student.in_features
        return self.student.out_features * width

    @property
    def teacher_key(self) -> str:
        """The teacher's spelling of its projection."""
        return projection_key(self.teacher)


def projection_key(projection: Projection) -> str:
    """``module`` or ``module#part``."""
    return projection.module + (f"#{projection.part}" if projection.part else "")


def projections_of(model: Model) -> dict[str, Projection]:
    """The logical projections of a model's layers, by key.

    Raises:
        IncompatibleError: the layers of the model differ in shape.

    """
    layers = model.checkpoint.layers
    first = _matrices(layers[0])
    for index, layer in enumerate(layers):
        if (shapes := _matrices(layer)) != first:
            name = next(n for n in sorted({*first, *shapes}) if first.get(n) != shapes.get(n))
            raise IncompatibleError(
                f"{model.folder}: layer {index}: {name}: expected shape {first.get(name)} as in "
                f"layer 0, found {shapes.get(name)}",
                "pkt needs decoder layers of one shape",
            )
    found: dict[str, Projection] = {}
    for module, (rows, columns) in first.items():
        for projection in _split(module, rows, columns, model):
            found[projection_key(projection)] = projection
    return found


def physical_rows(projection: Projection, head_dim: int, kv_repeat: int) -> list[int] | None:
    """Stored row of each logical row; ``None`` where both are the same.

    A part of a fused matrix is a run of rows, or (GPT-NeoX) one block a head; repeated kv heads
    name their rows ``kv_repeat`` times, whole heads in order.
    """
    block = projection.block or projection.out_features
    if projection.part is None and kv_repeat == 1:
        return None
    rows = [
        projection.start + first * (projection.stride or block) + row
        for first in range(projection.out_features // block)
        for row in range(block)
    ]
    if kv_repeat == 1:
        return rows
    heads = [rows[i : i + head_dim] for i in range(0, len(rows), head_dim)]
    return [row for head in heads for _ in range(kv_repeat) for row in head]


def match(
    teacher: Model,
    student: Model,
    targets: Sequence[str] | None,
    embeddings: bool,
    whole_heads: bool = False,
) -> tuple[list[Pair], list[MatchRow], list[str]]:
    """Pair every wanted student projection with its teacher projection.

    Args:
        teacher: larger model.
        student: smaller model.
        targets: roles (``q``) or module names (``q_proj``); ``None`` for all.
        embeddings: whether embedding and head are wanted too.
        whole_heads: whether heads and neurons must match across matrices (``consistent``); kv heads
            are then repeated where the student has more of them, not where its matrix is larger.

    Returns:
        the pairs, the table of `inspect` (module, teacher shape, student shape, action), and
        what forbids the run, one line each.

    Raises:
        UsageError: a target that no student module has.

    """
    ours, theirs = projections_of(student), projections_of(teacher)
    by_role = {projection.role: projection for projection in theirs.values()}
    wanted = _wanted(ours, targets)
    pairs: list[Pair] = []
    rows: list[MatchRow] = []
    problems: list[str] = []
    if teacher.layers < student.layers:
        problems.append(
            f"layers: the teacher has {teacher.layers}, the student {student.layers}; "
            "the student must not be deeper than the teacher"
        )
    for key, projection in ours.items():
        source = theirs.get(key) or by_role.get(projection.role)
        shape = (projection.out_features, projection.in_features)
        their_shape = (source.out_features, source.in_features) if source else None
        if key not in wanted:
            rows.append(MatchRow(key, their_shape, shape, "not a target"))
            continue
        if source is None:
            rows.append(MatchRow(key, None, shape, "refused: not in the teacher", False))
            problems.append(f"{key}: the teacher's layers have no {projection.role} projection")
            continue
        if whole_heads:
            repeat = kv_splits(teacher, student) if projection.role in ("k", "v") else 1
        else:
            repeat = _kv_repeat(source, projection, teacher)
        pair = Pair(key, projection, source, repeat)
        teacher_shape = (pair.teacher_rows, source.in_features)
        if teacher_shape[0] < shape[0] or teacher_shape[1] < shape[1]:
            rows.append(MatchRow(key, their_shape, shape, "refused: teacher is smaller", False))
            problems.append(
                f"{key}: teacher shape {teacher_shape}, student shape {shape}; "
                "the student must not be larger than the teacher"
            )
            continue
        rows.append(MatchRow(key, their_shape, shape, _action(pair, shape)))
        pairs.append(pair)
    if whole_heads:
        problems += structure_problems(
            teacher, student, [(pair.key, pair.student, pair.teacher) for pair in pairs]
        )
    if embeddings:
        _match_embeddings(teacher, student, rows, problems)
    return pairs, rows, problems


def wanted_modules(student: Model, targets: Sequence[str] | None) -> set[str]:
    """The modules below a layer ("self_attn.q_proj") that ``targets`` name, fused ones whole.

    Raises:
        UsageError: a target that no module has.

    """
    ours = projections_of(student)
    return {ours[key].module for key in _wanted(ours, targets)}


def _match_embeddings(
    teacher: Model, student: Model, rows: list[MatchRow], problems: list[str]
) -> None:
    for name, theirs, ours in (
        ("embedding", teacher.embedding, student.embedding),
        ("head", teacher.head or teacher.embedding, student.head or student.embedding),
    ):
        fits = theirs.shape[0] == ours.shape[0] and theirs.shape[1] >= ours.shape[1]
        action = f"columns {ours.shape[1]} of {theirs.shape[1]}" if fits else "refused"
        rows.append(MatchRow(name, theirs.shape, ours.shape, action, fits))
        if theirs.shape[0] != ours.shape[0]:
            problems.append(
                f"{name}: vocabulary of the teacher {theirs.shape[0]}, of the student "
                f"{ours.shape[0]} (padding rows counted); --embeddings needs the same rows"
            )
        elif not fits:
            problems.append(
                f"{name}: teacher width {theirs.shape[1]}, student width {ours.shape[1]}; "
                "the student must not be wider than the teacher"
            )


def _action(pair: Pair, shape: tuple[int, int]) -> str:
    full = (pair.teacher_rows, pair.teacher.in_features)
    action = "whole matrix" if full == shape else f"window {shape[0]}×{shape[1]}"
    if pair.kv_repeat > 1:
        action += f" of {full[0]}×{full[1]} (kv heads × {pair.kv_repeat})"
    return action


def _kv_repeat(teacher: Projection, student: Projection, model: Model) -> int:
    """Grouped-query expansion, and only where the student's k or v has more rows."""
    grouped = model.heads > model.kv_heads
    if student.role in ("k", "v") and grouped and student.out_features > teacher.out_features:
        return model.heads // model.kv_heads
    return 1


def _wanted(ours: Mapping[str, Projection], targets: Sequence[str] | None) -> set[str]:
    if not targets:
        return set(ours)
    chosen: set[str] = set()
    for target in targets:
        hits = {
            key
            for key, p in ours.items()
            if target in (p.role, p.module, p.module.rsplit(".", 1)[-1], key)
        }
        if not hits:
            known = sorted({p.role for p in ours.values()})
            raise UsageError(f"--targets: no module '{target}'", f"known: {', '.join(known)}")
        chosen |= hits
    return chosen


def _matrices(layer: Mapping[str, Piece]) -> dict[str, tuple[int, int]]:
    return {
        suffix.removesuffix(".weight"): (piece.shape[0], piece.shape[1])
        for suffix, piece in sorted(layer.items())
        if suffix.endswith(".weight") and not suffix.endswith("norm.weight")
        if len(piece.shape) == 2
    }


def _unknown_layout(model: Model, module: str, rows: int) -> IncompatibleError:
    return IncompatibleError(
        f"{model.folder}: '{model.family}': {module} fuses several projections in {rows} rows; "
        "expected a layout that pkt knows",
        "known: Phi-3's qkv_proj and gate_up_proj, GPT-NeoX's query_key_value",
    )


def _split(module: str, rows: int, columns: int, model: Model) -> list[Projection]:
    leaf = module.rsplit(".", 1)[-1]
    head = model.head_dim
    if leaf == "qkv_proj":
        sizes = {"q": model.heads * head, "k": model.kv_heads * head, "v": model.kv_heads * head}
    elif leaf == "gate_up_proj":
        sizes = {"gate": rows // 2, "up": rows // 2}
    elif leaf == "query_key_value" and rows == 3 * model.heads * head:
        each = model.heads * head
        return [
            Projection(part, module, part, each, columns, index * head, head, 3 * head)
            for index, part in enumerate("qkv")
        ]
    elif leaf in _FUSED:
        raise _unknown_layout(model, module, rows)
    else:
        return [Projection(_ROLES.get(leaf, module), module, None, rows, columns)]
    if sum(sizes.values()) != rows:
        raise _unknown_layout(model, module, rows)
    parts, start = [], 0
    for part, size in sizes.items():
        parts.append(Projection(part, module, part, size, columns, start))
        start += size
    return parts
