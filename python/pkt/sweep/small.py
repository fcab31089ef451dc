"""Gradients of what is no linear weight, norms and biases, of each seed of a batch.

Autograd adds what the seeds of a batch give a parameter; |θ · ∂L/∂θ| wants them apart. Of a linear
bias the gradient is the sum of dY over a seed's tokens. Any other parameter belongs to a module
that maps one tensor to one, token by token: its input and upstream gradient are noted, and it alone
is run once more for each seed. In a family that does otherwise seeds are swept one by one, by
autograd alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class ApartError(Exception):
    """Seeds cannot share a call: what each is given alone was not found, or has other bits."""


class SmallParameters:
    """Hooks on the modules of one layer that own such parameters, for a ``with`` block.

    Args:
        layer: it, as a module.
        linears: its linear modules by suffix, whose weights are not wanted.

    """

    def __init__(self, layer: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        self._layer = layer
        self._owned: dict[str, list[str]] = {}  # parameters by the module that they belong to
        for name, _ in layer.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if not (owner in linears and leaf == "weight"):
                self._owned.setdefault(owner, []).append(leaf)
        self._linears = linears
        self._inputs: dict[str, torch.Tensor] = {}
        self._upstream: dict[str, torch.Tensor] = {}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One forward and backward, whose inputs and gradients are noted until the next."""
        self._inputs, self._upstream = {}, {}
        with ExitStack() as stack:
            for owner in self._owned:
                module = self._layer.get_submodule(owner)
                hook = module.register_forward_hook(self._hook(owner), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def gradients(
        self, row: int, lengths: Sequence[int], weights: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """By parameter, the gradient of the seed in ``row`` of the batch.

        Args:
            row: of the batch.
            lengths: tokens of each of its seeds; the shorter ones are padded on the right.
            weights: of the layer.

        Raises:
            ApartError: a module does not map one tensor to one, token by token.

        """
        found = {}
        for owner, leaves in self._owned.items():
            if owner not in self._upstream:  # not called, or its output not used
                continue
            x = _of_seed(self._inputs[owner], row, lengths)
            dy = _of_seed(self._upstream[owner], row, lengths)
            if owner in self._linears:
                found[f"{owner}.bias"] = dy.flatten(0, -2).sum(0)
                continue
            names = [f"{owner}.{leaf}" for leaf in leaves]
            with torch.enable_grad():
                live = {leaf: weights[n].detach().requires_grad_()
                        for leaf, n in zip(leaves, names, strict=True)}  # fmt: skip
                module = self._layer.get_submodule(owner)
                output = torch.func.functional_call(module, live, (x,))
                made = torch.autograd.grad(output, list(live.values()), dy)
            found |= dict(zip(names, made, strict=True))
        return found

    def _hook(self, owner: str) -> Any:
        module = self._layer.get_submodule(owner)
        whole = len(list(module.parameters())) == len(self._owned[owner]) or owner in self._linears

        def forward(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
            plain = whole and owner not in self._inputs and len(args) == 1 and not named
            if not plain or not isinstance(output, torch.Tensor):
                raise ApartError
            self._inputs[owner] = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda dy: self._upstream.__setitem__(owner, dy.detach()))

        return forward


def _of_seed(noted: torch.Tensor, row: int, lengths: Sequence[int]) -> torch.Tensor:
    """One seed's part of (seeds, rows, …), (seeds · rows, …) or (seeds, heads, rows, …)."""
    count, rows = len(lengths), max(lengths)
    if noted.shape[0] == count * rows:
        noted = noted.unflatten(0, (count, rows))
    along = [axis for axis in range(1, noted.ndim - 1) if noted.shape[axis] == rows]
    padded = len(set(lengths)) > 1
    if noted.shape[0] != count or not along or (padded and len(along) > 1):
        raise ApartError
    return noted[row : row + 1].narrow(along[0], 0, lengths[row])
