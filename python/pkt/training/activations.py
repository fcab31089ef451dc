"""The student's activations at chosen layers, taken out of one forward pass by hooks.

Hooks hand out references and are gone before the backward pass: with gradient checkpointing a layer
that is computed again is then computed as it was, without anyone looking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from pkt.errors import IncompatibleError
from pkt.records import Sample
from pkt.sublayers import SubLayer, SubLayers, layer_stack

TOKENS = 64  # that a family is tried on
BOUND = 1e-4  # relative, in float32; a bfloat16 model is allowed its rounding
BFLOAT16_BOUND = 0.1


Place = Literal["in", "out", "attn", "mlp"]
Point = tuple[Place, int]  # what of a layer, and its number, from 1


@dataclass(frozen=True, slots=True)
class View:
    """An activation: of which student layer, from 1, and where.

    ``mlp`` and ``attn``: what the sub-layer adds to the residual stream; ``block``: h_out − h_in;
    ``hidden``: h_out; ``span`` is of the teacher what ``block`` is of the student.
    """

    layer: int
    interface: str


class Activations:
    """What was seen in one forward pass; tensors (samples, tokens, D), part of its graph."""

    def __init__(self) -> None:
        self.seen: dict[Point, torch.Tensor] = {}
        self.parts: dict[int, SubLayers] = {}  #: of the layers whose sub-layers are looked at

    def of(self, view: View, counted: torch.Tensor) -> torch.Tensor:
        """The activation at ``counted`` positions, (n, D) float32.

        Args:
            view: one of those asked for.
            counted: (samples, tokens) bool; the last tokens of the activation may be left out.

        """
        parts = [
            sign * self.at(point)[:, : counted.shape[1]][counted].float()
            for sign, point in _points(view)
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def at(self, point: Point) -> torch.Tensor:
        """What was seen there, (samples, tokens, D).

        Raises:
            IncompatibleError: a sub-layer that is not to be found in this family.

        """
        if point not in self.seen:
            self.seen[point] = self.parts[point[1]].added(cast("SubLayer", point[0]))
        return self.seen[point]


@contextmanager
def watching(model: Any, views: Sequence[View]) -> Iterator[Activations]:
    """Activations of the forward pass that is made in the block.

    Args:
        model: a transformers causal model, wrapped by PEFT or not.
        views: what to look at.

    Raises:
        IncompatibleError: the family has no such place.

    """
    found, family = Activations(), str(model.config.model_type)
    points = {point for view in views for _, point in _points(view)}
    layers = layer_stack(model)[1] if points else ()
    with ExitStack() as stack:
        for point in sorted(points):
            kind, number = point
            layer = layers[number - 1]
            if kind == "in":
                look = _before(found.seen, point)
                stack.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
            elif kind == "out":
                stack.callback(layer.register_forward_hook(_after(found.seen, point)).remove)
            elif number not in found.parts:
                found.parts[number] = stack.enter_context(SubLayers(layer, number, family))
        yield found
        for point in points:
            found.at(point)


class Readout:
    """Logits of a hidden state of any layer, as the model makes them of its last: head(norm(h)).

    Soft caps and scales of logits, which some families apply behind the head, are applied too.
    """

    def __init__(self, model: Any) -> None:
        self._head, self._config = model.get_output_embeddings(), model.config.get_text_config()
        inside = {id(part) for layer in layer_stack(model)[1] for part in layer.modules()}
        norms = [
            module
            for module in model.modules()
            if id(module) not in inside
            and "norm" in type(module).__name__.lower()
            and not list(module.children())
        ]
        if len(norms) != 1:
            raise IncompatibleError(
                f"model family '{self._config.model_type}': expected one norm behind its decoder "
                f"layers, found {len(norms)}",
                "take an objective that needs no logits of inner layers: v1 or v2",
            )
        self._norm = norms[0]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) float32 of hidden states (n, D)."""
        weight: torch.Tensor = self._head.weight
        logits: torch.Tensor = self._head(self._norm(hidden.to(weight.dtype))).float()
        if scale := getattr(self._config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(self._config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(self._config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits


@torch.no_grad()
def require_parts(model: Any, layer: int, sample: Sample) -> None:
    """Raise unless a layer's sub-layers are found by what they add, tried on ``sample``.

    Raises:
        IncompatibleError: they are not.

    """
    parts = SubLayers(layer_stack(model)[1][layer - 1], layer, str(model.config.model_type))
    with parts:
        _tried(model, (), sample)
        parts.find()


@torch.no_grad()
def require_readout(model: Any, layers: int, sample: Sample) -> None:
    """Raise unless the model's logits are `Readout` of its last hidden state, tried on ``sample``.

    Raises:
        IncompatibleError: the family makes its logits in another way.

    """
    logits, states = _tried(model, [View(layers, "hidden")], sample)
    _require_near(model, Readout(model)(states[0]), logits, "logits that are head(norm(h))")


def _tried(
    model: Any, views: Sequence[View], sample: Sample
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    training = model.training
    model.eval()
    ids = torch.tensor([sample.tokens[:TOKENS]], device=model.device)
    with watching(model, views) as seen:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(training)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return logits, [seen.of(view, everywhere) for view in views]


def _require_near(model: Any, found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    bound = BOUND if model.get_output_embeddings().weight.dtype == torch.float32 else BFLOAT16_BOUND
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= bound:
        raise IncompatibleError(
            f"model family '{model.config.model_type}': expected {what}; they differ by "
            f"{error:.2g} of their size",
            "take objective v1 or v2",
        )


def _points(view: View) -> list[tuple[int, Point]]:
    """What is added and subtracted: sign, and (what of a layer, layer)."""
    if view.interface in ("mlp", "attn"):
        return [(1, (cast("Place", view.interface), view.layer))]
    if view.interface == "hidden":
        return [(1, ("out", view.layer))]
    return [(1, ("out", view.layer)), (-1, ("in", view.layer))]


def _before(seen: dict[Point, torch.Tensor], point: Point) -> Any:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _keep(seen, point, args[0] if args else kwargs.get("hidden_states"))

    return look


def _after(seen: dict[Point, torch.Tensor], point: Point) -> Any:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        _keep(seen, point, output[0] if isinstance(output, tuple) else output)

    return look


def _keep(seen: dict[Point, torch.Tensor], point: Point, found: Any) -> None:
    if not isinstance(found, torch.Tensor) or found.ndim != 3 or point in seen:
        raise IncompatibleError(
            f"layer {point[1]}: expected one tensor (samples, tokens, D) at '{point[0]}' in each "
            "forward pass",
            "take --interface block or hidden",
        )
    seen[point] = found
