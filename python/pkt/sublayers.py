"""What attention and MLP of a decoder layer add to the residual stream, caught as the layer runs.

Families write a layer differently: after which norm (Gemma, OLMo 2), dropout or nothing a
sub-layer's output is added, whether both see the same input, and whether it is multiplied first
(Granite's ``residual_multiplier`` f). What is added is found by a law instead of by name: it is the
pair of modules, one of attention and one of the MLP, whose outputs make up the difference,
``f · attn + f · mlp = h_out − h_in``. Where no pair does, it is refused.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pkt.errors import IncompatibleError

SubLayer = Literal["attn", "mlp"]
TOLERANCE = 8  # roundings, relative to what is added and to the states
_WORDS: dict[SubLayer, tuple[str, ...]] = {
    "attn": ("attn", "attention"),
    "mlp": ("mlp", "feed", "ffn", "moe", "fc2"),
}
_FOUND: WeakKeyDictionary[nn.Module, dict[SubLayer, str]] = WeakKeyDictionary()


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a transformers causal model, or of one wrapped by PEFT, and their name.

    Raises:
        IncompatibleError: they are not in one ModuleList.

    """
    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outermost = [s for s in stacks if not any(s[0].startswith(f"{o[0]}.") for o in stacks)]
    if len(outermost) != 1:
        raise IncompatibleError(
            f"model family '{config.model_type}': expected its {count} decoder layers in one "
            f"ModuleList, found {len(outermost)} such lists"
        )
    return outermost[0]


class SubLayers:
    """Hooks on one decoder layer, for the time of a ``with`` block, which may be entered again.

    Args:
        layer: it, as a module.
        number: of the layer, from 1; for messages.
        family: of its model; for messages.

    """

    def __init__(self, layer: nn.Module, number: int, family: str) -> None:
        self._layer, self._number, self._family = layer, number, family
        self._factor = float(getattr(layer, "residual_multiplier", 1.0))
        self._stack = ExitStack()
        self._seen: dict[str, torch.Tensor] = {}
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> SubLayers:
        for name, module in self._layer.named_children():
            if any(word in name for words in _WORDS.values() for word in words):
                self._stack.callback(module.register_forward_hook(self._hook(name)).remove)
        note = self._layer.register_forward_hook(self._note, with_kwargs=True)
        self._stack.callback(note.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._seen, self._ends = {}, None

    def output(self, which: SubLayer) -> torch.Tensor:
        """What the module of a sub-layer put out in the last call, (rows, n, D), in its graph.

        Raises:
            IncompatibleError: no two modules of this layer add up to what it adds.

        """
        if self._layer not in _FOUND:
            _FOUND[self._layer] = self.find()
        return self._seen[_FOUND[self._layer][which]]

    def added(self, which: SubLayer) -> torch.Tensor:
        """What the sub-layer added in the last call: its `output` times the layer's factor.

        Raises:
            As `output`.

        """
        output = self.output(which)
        return output if self._factor == 1.0 else output * self._factor

    @torch.no_grad()
    def find(self) -> dict[SubLayer, str]:
        """The two modules whose outputs, in the last call, miss ``h_out − h_in`` by the least.

        Raises:
            IncompatibleError: no two of them miss it by little enough.

        """
        assert self._ends is not None, "the layer has been called"
        entered, left = (end.detach().double() for end in self._ends)
        step = torch.finfo(self._ends[1].dtype).eps
        found: list[tuple[float, dict[SubLayer, str]]] = []
        for attn, mlp in product(self._named("attn"), self._named("mlp")):
            one, other = (self._factor * self._seen[name].double() for name in (attn, mlp))
            miss = (left - entered - one - other).abs()
            scale = entered.abs() + left.abs() + one.abs() + other.abs()
            far = float((miss / scale.clamp_min(torch.finfo(torch.float32).tiny)).max())
            found.append((far, {"attn": attn, "mlp": mlp}))
        best = min(found, key=lambda each: each[0], default=None)
        if best is None or not best[0] <= TOLERANCE * step:
            raise IncompatibleError(
                f"model family '{self._family}': what attention and MLP of layer {self._number} "
                "add to the hidden state was not found among its modules",
                "take --interface block or hidden, which every family has",
            )
        return best[1]

    def _named(self, which: SubLayer) -> list[str]:
        """Modules of this sub-layer whose output could be added, the last called first.

        A dropout behind the sub-layer changes nothing until a model is trained: of equals, it.
        """
        assert self._ends is not None
        shape = self._ends[1].shape
        return [
            name
            for name, output in reversed(self._seen.items())
            if output.shape == shape and any(word in name for word in _WORDS[which])
        ]

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                self._seen.pop(name, None)  # so that the order is that of the calls
                self._seen[name] = first

        return forward

    def _note(self, module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else named["hidden_states"]
        self._ends = entered, output[0] if isinstance(output, tuple) else output
