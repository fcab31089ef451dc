"""A model without weights, whose decoder layers can be called one at a time.

transformers builds the model on the meta device and keeps its own forward: recorders stand in
for the decoder layers, pass hidden states through and note the arguments (masks, position
embeddings) that the model calls each layer with. Nothing here knows a family; a model whose
forward does more between its layers than pass one tensor along is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import IncompatibleError
from pkt.sublayers import SubLayers, layer_stack

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Tape:
    """What the recorders see during one forward of the model."""

    def __init__(self, layers: int, family: str) -> None:
        self.layers, self.family = layers, family
        self.start()

    def start(self, last: torch.Tensor | None = None) -> None:
        """Forget the last run; ``last`` is what the final layer is to return."""
        self.calls: list[Call] = []
        self.first: torch.Tensor | None = None
        self._expected: torch.Tensor | None = None
        self._last = last

    def visit(self, index: int, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in place of layer ``index``; refuses what is not one tensor handed along."""
        if index != len(self.calls) or not isinstance(hidden, torch.Tensor):
            raise self.refusal("does not call its decoder layers once each, in order")
        if index == 0:
            self.first = hidden
        elif self._expected is not None and hidden.shape == self._expected.shape[1:]:
            raise self.refusal("takes tuples from its decoder layers, not hidden states")
        elif hidden is not self._expected:
            raise self.refusal(f"changes the hidden state between layers {index - 1} and {index}")
        self.calls.append((args, kwargs))
        ends = index == self.layers - 1 and self._last is not None
        self._expected = self._last if ends else hidden
        return self._expected

    def refusal(self, reason: str) -> IncompatibleError:
        """The error for a family that the sweep would compute wrongly."""
        return IncompatibleError(
            f"model family '{self.family}': its forward {reason}",
            "the layer-major sweep needs decoder layers that only hand one hidden state along",
        )


class Recorder(nn.Module):
    """Stands in for one decoder layer; attributes the model asks of it are the layer's own."""

    def __init__(self, layer: nn.Module, index: int, tape: Tape) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self._index, self._tape = index, tape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Pass ``hidden_states`` through and note the call."""
        return self._tape.visit(self._index, hidden_states, args, kwargs)


@dataclass(frozen=True)
class Skeleton:
    """The parts of a causal language model, all parameters on meta.

    ``embedding`` and ``head`` are the names of their parameters; ``outer`` those of every other
    parameter outside the decoder layers (the final norm, for one).
    """

    family: str
    model: nn.Module
    base: nn.Module  #: the model without its head
    layers: tuple[nn.Module, ...]
    layers_path: str
    base_prefix: str
    embedding: str
    head: str
    outer: tuple[str, ...]
    may_tie: bool  #: the configuration ties head and embedding
    padding_idx: int | None  #: token whose embedding row receives no gradient from look-ups
    tape: Tape

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear modules of layer ``index``, by suffix."""
        modules = self.layers[index].named_modules()
        return {name: m for name, m in modules if isinstance(m, nn.Linear)}

    def sublayers(self, index: int) -> SubLayers:
        """Hooks on the sub-layers of layer ``index``."""
        return SubLayers(self.layers[index], index + 1, self.family)

    def prefix(self, rows: torch.Tensor, outer: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The input of layer 0, shape (1, n, D), for gathered embedding ``rows`` (n, D).

        Afterwards ``tape.calls`` holds how the model calls each of its layers.
        """
        strip = f"{self.base_prefix}."
        weights = {n.removeprefix(strip): t for n, t in outer.items() if n.startswith(strip)}
        weights[self.embedding.removeprefix(strip)] = rows
        self.tape.start()
        self._call(self.base, weights, torch.arange(rows.shape[0], device=rows.device)[None])
        if self.tape.first is None or len(self.tape.calls) != len(self.layers):
            raise self.tape.refusal("does not call all of its decoder layers")
        if self.tape.first.shape != (1, *rows.shape) or self.tape.first.dtype != rows.dtype:
            raise self.tape.refusal("widens or converts its embeddings before the first layer")
        return self.tape.first

    def logits(
        self, hidden: torch.Tensor, head: torch.Tensor, outer: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Logits (n, V) of last hidden states (n, D): final norm, head, and what follows it."""
        count, width = hidden.shape
        self.tape.start(last=hidden[None])
        rows = torch.zeros(1, width, dtype=head.dtype, device=head.device)
        weights = {**outer, self.embedding: rows, self.head: head}
        ids = torch.zeros(1, count, dtype=torch.long, device=head.device)
        logits: torch.Tensor = self._call(self.model, weights, ids).logits
        return logits[0]

    def normed(self, hidden: torch.Tensor, outer: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the head is given (n, D) for last hidden states (n, D): the final norm of them."""
        seen: list[torch.Tensor] = []
        linear = self.model.get_submodule(self.head.removesuffix(".weight"))
        handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.logits(hidden, torch.zeros_like(hidden[:1]), outer)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].shape != (1, *hidden.shape):
            raise self.tape.refusal("does not hand its last hidden states to its head")
        return seen[0][0]

    def _call(self, module: nn.Module, weights: Mapping[str, torch.Tensor], ids: Any) -> Any:
        absent = [name for name, _ in module.named_parameters() if name not in weights]
        if absent:
            raise self.tape.refusal(f"uses a parameter that pkt cannot place, '{absent[0]}'")
        kwargs = {"input_ids": ids, "use_cache": False}
        return torch.func.functional_call(module, dict(weights), (), kwargs, tie_weights=False)


def build_skeleton(
    folder: Path, dtype: torch.dtype, device: torch.device | None = None
) -> Skeleton:
    """The model of ``folder``'s configuration, without weights, ready to be swept.

    Parameters are on meta; buffers (rotary frequencies, embedding scales) are on ``device``, by
    default the CPU. Head and embedding are separate parameters here even where the configuration
    ties them: the sweep hands each its tensor.

    Raises:
        IncompatibleError: the family has no causal model, needs remote code, or does not keep
            its decoder layers in one ModuleList.

    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with _understood(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._attn_implementation = None  # the family's own: what a stranger ran it with is not
        config.return_dict = True  # how it is to be swept
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device or "cpu"))
    model.config.pad_token_id = None  # rows are gathered: ids are positions, none is padding
    family = str(config.model_type)
    path, stack = layer_stack(model)
    tape = Tape(len(stack), family)
    layers = tuple(stack)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise tape.refusal("has no nn.Embedding in front and nn.Linear head behind its layers")
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    padding_idx, embedding.padding_idx = embedding.padding_idx, None
    for index, layer in enumerate(layers):
        stack[index] = Recorder(layer, index, tape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ends = (names[id(embedding.weight)], names[id(head.weight)])
    return Skeleton(
        family=family,
        model=model,
        base=model.base_model,
        layers=layers,
        layers_path=path,
        base_prefix=model.base_model_prefix,
        embedding=ends[0],
        head=ends[1],
        outer=tuple(name for name in names.values() if name not in ends),
        may_tie=bool(config.get_text_config().tie_word_embeddings),
        padding_idx=padding_idx,
        tape=tape,
    )


def attention_kinds(folder: Path, layers: int) -> tuple[str, ...]:
    """The attention of each of a model's ``layers``, as transformers calls it.

    Raises:
        IncompatibleError: transformers does not understand its configuration.

    """
    from transformers import AutoConfig

    with _understood(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    if listed := getattr(config, "layer_types", None):
        return tuple(listed)
    sliding = getattr(config, "sliding_window", None)
    if sliding and getattr(config, "use_sliding_window", True):
        return ("sliding_attention",) * layers
    return ("full_attention",) * layers


@contextlib.contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """Turn transformers' refusals of a configuration into one clear line."""
    from huggingface_hub.errors import StrictDataclassError

    odd = (
        ValueError, KeyError, ImportError, AttributeError, TypeError, AssertionError, RuntimeError,
        StrictDataclassError,
    )  # fmt: skip
    try:
        yield
    except odd as error:
        reason = " ".join(str(error).split())[:200]
        where = f"{folder}: transformers cannot build this model"
        raise IncompatibleError(f"{where}: {reason}") from error
