"""The arms of a comparison: one table, one line each; a new method joins by adding its line.

An arm says how its start is made (options of `pkt extract`, or none: it begins with nothing of the
teacher's) and how it is trained (options of `pkt train`; ``distill``: on the teacher's logits;
``objective``: on its activations, as `pkt align` does). Everything else, from the data to the
length of the training, is the same for all. SEMALIGN adapts fewer modules, so each of its arms has
a plain LoRA on the same modules and layers beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pkt.errors import UsageError

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to start, under test."""

    name: str
    about: str
    extract: Options | None  #: options of the extraction it begins from; None: none
    train: Options = field(default_factory=dict)
    examples: int = 0  #: first so many training examples; 0: all there are
    states: Options = field(default_factory=dict)  #: of the activations it learns from
    like: str = ""  #: the objective whose modules and layers plain LoRA has

    @property
    def extracts(self) -> bool:
        """Whether it begins from an extraction."""
        return self.extract is not None

    @property
    def distils(self) -> bool:
        """Whether it learns from the teacher's logits."""
        return "distill" in self.train

    @property
    def aligns(self) -> bool:
        """Whether it learns from the teacher's activations."""
        return "objective" in self.train

    @property
    def knows_teacher(self) -> bool:
        """Whether anything of the teacher reaches the student."""
        return self.extracts or self.distils or self.aligns

    def options(self) -> dict[str, Any]:
        """What of it changes its results, JSON-able."""
        found = {"extract": self.extract, "train": self.train, "examples": self.examples}
        more = {"states": self.states, "like": self.like}
        return {**found, **{name: value for name, value in more.items() if value}}

    @property
    def random_start(self) -> bool:
        """Whether its extraction depends on the repeat."""
        return self.extracts and (
            str((self.extract or {}).get("select")) in _RANDOM
            or (self.extract or {}).get("layers") == "random"
        )


_ROLES = ("q", "k", "v", "o", "gate", "up", "down")  # as kd adapts; an objective's own are fewer
_KD = {"distill": "topk-kl"}  # compare itself has the targets written
_RANDOM = ("random-window", "random-weights", "orthogonal")

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("lora", "plain LoRA: A uniform, B zero", None, {"init": "lora"}),
        Arm("pissa", "the student's own leading directions", None, {"init": "pissa"}),
        Arm("gaussian", "Gaussian, of the student's own norms", None, {"init": "gaussian"}),
        Arm("seeking", "the paper's: window, U·Σ and Vᵀ, residual", {}),
        Arm("seeking-balanced", "√Σ in both factors", {"split": "balanced"}),
        Arm("seeking-scaled", "the start times 0.1", {}, {"start": "scaled:0.1"}),
        Arm("seeking-a-only", "A in the window's subspace, B zero", {}, {"start": "a-only"}),
        Arm("orthogonal", "random factors, the window's Σ", {"select": "orthogonal"}),
        Arm("random-window", "a window anywhere", {"select": "random-window"}),
        Arm("rows-cols", "the most sensitive rows and columns", {"select": "rows-cols"}),
        Arm("top-weights", "the most sensitive single weights", {"select": "top-weights"}),
        Arm("random-weights", "single weights anywhere", {"select": "random-weights"}),
        Arm("random-layers", "windows of random layers", {"layers": "random"}),
        Arm("consistent", "one index set for the whole model", {"select": "consistent"}),
        Arm("kd", "plain LoRA on the teacher's top 64 logits", None, {"init": "lora", **_KD}),
        Arm("seeking+kd", "seeking-a-only on those logits", {}, {"start": "a-only", **_KD}),
        Arm("semalign-v1", "the paper's: cosines at a critical layer", None, {"objective": "v1"}),
        Arm("lora-as-v1", "plain LoRA on v1's modules, layer", None, {"init": "lora"}, like="v1"),
        Arm("semalign-v2", "geometry of tokens, layer by layer", None, {"objective": "v2"}),
        Arm("semalign-acl", "Fisher-weighted logits, layer by layer", None, {"objective": "acl"}),
        Arm("hidden-mse", "squared errors of hidden states", None, {"objective": "hidden-mse"}),
        Arm("lora-as-v2", "plain LoRA on their modules", None, {"init": "lora"}, like="v2"),
        Arm(
            "kd+semalign",
            "kd, and a tenth as much for cosines of all hidden states",
            None,
            {"objective": "v1", "output_loss": "kl", "kl_weight": 10.0, "targets": _ROLES},
            states={"critical": 0, "interface": "hidden", "map": "dual"},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Variation:
    """What `--vary` changes of an arm, and the values it takes unless told otherwise."""

    values: Sequence[str]
    change: Callable[[Arm, str], Arm]


def _extract(arm: Arm, **options: Any) -> Arm:
    return replace(arm, extract={**(arm.extract or {}), **options})


def _both(arm: Arm, **options: Any) -> Arm:
    changed = replace(arm, train={**arm.train, **options})
    return _extract(changed, **options) if arm.extracts else changed


VARIATIONS: Mapping[str, Variation] = {
    "rank": Variation(
        ("1", "2", "4", "8", "16", "32"), lambda arm, value: _both(arm, rank=int(value))
    ),
    "seed-count": Variation(
        ("1", "4", "16", "32"), lambda arm, value: _extract(arm, limit=int(value))
    ),
    "layers": Variation(
        ("sensitivity", "random", "first", "last"),
        lambda arm, value: _extract(arm, layers=value),
    ),
    "targets": Variation(
        ("q,k,v,o", "gate,up,down", "q,k,v,o,gate,up,down"),
        lambda arm, value: _both(arm, targets=tuple(part.strip() for part in value.split(","))),
    ),
    "select": Variation(
        ("window", "rows-cols", "top-weights", "random-window", "random-weights", "orthogonal"),
        lambda arm, value: _extract(arm, select=value),
    ),
    "split": Variation(("paper", "balanced"), lambda arm, value: _extract(arm, split=value)),
    "scale": Variation(
        ("0.03", "0.1", "0.3", "1"),
        lambda arm, value: replace(arm, train={**arm.train, "start": f"scaled:{float(value):g}"}),
    ),
    "lr-ratio": Variation(
        ("1", "4", "16"),
        lambda arm, value: replace(arm, train={**arm.train, "lr_ratio": float(value)}),
    ),
    "map": Variation(
        ("cosine", "dual", "ridge", "procrustes", "flex", "embedding", "random", "truncate"),
        lambda arm, value: replace(arm, states={**arm.states, "map": value}),
    ),
    "interface": Variation(
        ("mlp", "attn", "block", "hidden"),
        lambda arm, value: replace(arm, states={**arm.states, "interface": value}),
    ),
    "output-loss": Variation(
        ("cosine", "ce", "kl"),
        lambda arm, value: replace(arm, train={**arm.train, "output_loss": value}),
    ),
    "kl-weight": Variation(
        ("1", "10", "100"),
        lambda arm, value: replace(arm, train={**arm.train, "kl_weight": float(value)}),
    ),
    "max-grad-norm": Variation(
        ("0.1", "1", "10"),
        lambda arm, value: replace(arm, train={**arm.train, "max_grad_norm": float(value)}),
    ),
    "examples": Variation(
        ("30", "100", "300", "1000"), lambda arm, value: replace(arm, examples=int(value))
    ),
}
_OF_EXTRACTION = ("seed-count", "layers", "select", "split")
_OF_ALIGNMENT = ("map", "interface", "output-loss", "kl-weight")


def chosen(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the table's order.

    Raises:
        UsageError: an arm that is not in the table.

    """
    for name in names:
        if name not in ARMS:
            raise UsageError(f"--arms: no arm '{name}'", f"known: {', '.join(ARMS)}")
    return [arm for name, arm in ARMS.items() if name in names]


def varied(arm: Arm, kind: str, values: Sequence[str] | None) -> list[Arm]:
    """``arm`` once for each value of what is varied, named ``arm kind=value``.

    Raises:
        UsageError: a variation that is not known, a value that it does not take, or one of the
            extraction for an arm that has none.

    """
    if kind not in VARIATIONS:
        raise UsageError(f"--vary: no variation '{kind}'", f"known: {', '.join(VARIATIONS)}")
    if kind in _OF_EXTRACTION and not arm.extracts:
        raise UsageError(f"--vary {kind}: arm '{arm.name}' extracts nothing")
    if kind in _OF_ALIGNMENT and not arm.aligns:
        raise UsageError(f"--vary {kind}: arm '{arm.name}' learns from no activations")
    if kind == "scale" and arm.train.get("init") == "lora":
        raise UsageError(f"--vary scale: arm '{arm.name}' begins at zero")
    variation = VARIATIONS[kind]
    try:
        return [
            replace(variation.change(arm, value), name=f"{arm.name} {kind}={value}")
            for value in values or variation.values
        ]
    except ValueError as error:
        raise UsageError(f"--vary {kind}: {error}") from error
