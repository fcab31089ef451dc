"""The teacher's side of SEMALIGN in training: targets with states, found to fit an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.api.distilling import no_logits, open_targets
from pkt.errors import DataError, IncompatibleError, UsageError
from pkt.models import Model
from pkt.records import SampleSet

MODULES = ("up", "down", "v", "o")
"""What SEMALIGN adapts in the paired layers."""

EPOCHS = 5.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What an objective asks of the targets; of several choices the first is its default."""

    interfaces: tuple[str, ...]
    map: str
    output_losses: tuple[str, ...] = ()  #: beside the layer loss; (): its own
    weighs_kl: bool = True  #: whether a KL stands beside a layer loss
    every_layer: bool = False  #: layer by layer: one teacher layer for each student layer


_OUTPUTS = ("cosine", "ce", "kl")

OBJECTIVES: Mapping[str, Kind] = {
    "v1": Kind(("mlp", "attn", "block", "hidden"), "cosine", _OUTPUTS),
    "v2": Kind(("span",), "dual", every_layer=True),
    "acl": Kind(("hidden",), "dual", weighs_kl=False, every_layer=True),
    "hidden-mse": Kind(("hidden",), "dual", ("ce", "cosine", "kl")),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """An objective and its options, found to go together."""

    objective: str
    output_loss: str | None
    kl_weight: float

    @property
    def kind(self) -> Kind:
        """What it asks of the targets."""
        return OBJECTIVES[self.objective]

    @property
    def wants_logits(self) -> bool:
        """Whether the teacher's logits are part of it, if every student layer is paired."""
        own = self.objective == "acl" or (self.objective == "v2" and self.kl_weight > 0)
        return own or self.output_loss == "kl"

    def options(self) -> dict[str, Any]:
        """What of it changes a result."""
        found: dict[str, Any] = {"objective": self.objective}
        if self.output_loss:
            found["output_loss"] = self.output_loss
        if self.objective == "v2" or self.output_loss == "kl":
            found["kl_weight"] = self.kl_weight
        return found


@dataclass(frozen=True, slots=True)
class Supervisor:
    """Opened targets: the objective of a run, the layers it trains, and what its manifest says."""

    objective: Any  #: `pkt.training.Alignment`
    layers: tuple[int, ...]  #: of the student, from 1
    origin: dict[str, Any]
    kernels: Any = None  #: `pkt.targets.Kernels` of the teacher, where they were written


def choose_objective(
    objective: str, output_loss: str | None, kl_weight: float | None, folder: str | Path | None
) -> Choice:
    """The options of an objective, its defaults filled in.

    Raises:
        UsageError: no such objective, an option that it does not have, or no targets.

    """
    kind = OBJECTIVES.get(objective)
    if kind is None:
        raise UsageError(f"--objective {objective}: expected one of {', '.join(OBJECTIVES)}")
    if not folder:
        raise UsageError(
            f"--objective {objective}: from which teacher?",
            "add --teacher-targets DIR, which pkt align --targets-only writes",
        )
    if output_loss is not None and output_loss not in kind.output_losses:
        known = ", ".join(kind.output_losses) or "none: it has its own"
        raise UsageError(
            f"--output-loss {output_loss}: expected one that {objective} takes ({known})"
        )
    chosen = output_loss or next(iter(kind.output_losses), None)
    has_kl = kind.weighs_kl and chosen in (None, "kl")
    if kl_weight is not None and not has_kl:
        raise UsageError(
            f"--kl-weight: {objective} has no KL beside its layer loss",
            "leave it out" + (", or add --output-loss kl" if kind.output_losses else ""),
        )
    weight = 1.0 if kl_weight is None else kl_weight
    least = "0 or more" if objective == "v2" else "more than 0"
    if not 0 <= weight < float("inf") or (weight == 0 and objective != "v2"):
        raise UsageError(f"--kl-weight {weight:g}: expected {least}")
    return Choice(objective, chosen, weight)


def open_supervisor(
    folder: Path,
    choice: Choice,
    student: Model,
    samples: SampleSet,
    options: Mapping[str, Any],
) -> Supervisor:
    """The targets in ``folder``, which have the states that the objective asks for.

    Args:
        folder: that `pkt align` wrote.
        choice: the objective.
        student: the model that learns.
        samples: what it learns from.
        options: how they were read: template, max_tokens, max_examples.

    Raises:
        UsageError: no such folder.
        CheckpointError: it is damaged.
        IncompatibleError: it holds no states, those of another place or of another student, or no
            logits where a KL is wanted.
        DataError: the targets are of other data, or of too few tokens.

    """
    from pkt.training import ALIGNMENTS

    opened = open_targets(folder, student, samples, options)
    targets, where = opened.targets, f"--teacher-targets {folder}"
    pairs, interface = tuple(targets.pairs), targets.interface
    if not pairs:
        raise IncompatibleError(
            f"{where}: expected activations for objective {choice.objective}, found logits alone",
            f"write targets with --interface {choice.kind.interfaces[0]}",
        )
    if interface not in choice.kind.interfaces:
        raise IncompatibleError(
            f"{where}: objective {choice.objective} needs activations of interface "
            f"{' or '.join(choice.kind.interfaces)}, found '{interface}'",
            f"write targets with --interface {choice.kind.interfaces[0]}",
        )
    _require_student(where, opened.student, student)
    objective = ALIGNMENTS[choice.objective](
        targets, str(interface), student.layers, opened.rows,
        choice.output_loss or "cosine", choice.kl_weight,
    )  # fmt: skip
    if objective.needs_logits and not targets.top_k:
        raise no_logits(folder, f"--objective {choice.objective}")
    require_rows(where, choice, targets)
    origin = {
        **opened.origin,
        "interface": interface,
        "map": targets.map,
        "pairs": [[pair.teacher, pair.student, pair.mix] for pair in pairs],
    }
    return Supervisor(objective, objective.layers, origin, targets.kernels())


def _require_student(where: str, written: Mapping[str, Any] | None, student: Model) -> None:
    """States are mapped by the student's own head: no other student can use them."""
    expected = student.hashes()
    if written != expected:
        found = written or {}
        differing = ", ".join(key for key in expected if found.get(key) != expected[key])
        raise IncompatibleError(
            f"{where}: its activations are mapped to another student than {student.name}: "
            f"{differing} differ",
            "write targets with this --student",
        )


def require_rows(where: str, choice: Choice, targets: Any) -> None:
    """Raise `DataError` unless an example has as many activations as the objective compares."""
    least = 2 if choice.objective == "v2" else 1
    if max(len(targets.aligned(example)) for example in range(len(targets.answers))) < least:
        why = "compares answer tokens of an example with one another" if least > 1 else "needs one"
        raise DataError(
            f"{where}: no example has {least} answer token{'s' * (least > 1)} with an activation; "
            f"objective {choice.objective} {why}",
            "take longer answers, or another objective",
        )
