"""What attention and MLP of a decoder layer add to the residual stream, caught as it runs.

Families write a layer differently: after which norm (Gemma, OLMo 2), dropout or nothing a
sub-layer's output is added, and whether both see the same input, is theirs. What is added is found
by a law instead of by name: it is the pair of modules, one of attention and one of the MLP, whose
outputs make up the difference, ``attn + mlp = h_out − h_in``. Where no pair does, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any, Literal, Protocol

import torch
from torch import nn

from pkt.errors import IncompatibleError
from pkt.sweep.skeleton import Skeleton
from pkt.sweep.spool import SeedWriter, Spool

SubLayer = Literal["attn", "mlp"]
_WORDS: dict[SubLayer, tuple[str, ...]] = {"attn": ("attn", "attention"), "mlp": ("mlp", "feed")}
TOLERANCE = 8  # roundings, relative to what is added and to the states


class Tap(Protocol):
    """What is taken of a layer while every seed goes forward through it."""

    def layer(self, index: int) -> AbstractContextManager[None]:
        """Around all calls of layer ``index``; what was taken is whole when the block ends."""

    def take(self, number: int, row: int = 0) -> None:
        """The layer has just been called: ``row`` of its batch was seed ``number``."""


class NoTap:
    """Takes nothing."""

    def layer(self, index: int) -> AbstractContextManager[None]:
        """Nothing is done around a layer."""
        return nullcontext()

    def take(self, number: int, row: int = 0) -> None:
        """Nothing is taken."""


class SubLayers:
    """Hooks on one decoder layer, for the time of a ``with`` block.

    Args:
        skeleton: model that the layer is of.
        index: of the layer, from 0.

    """

    def __init__(self, skeleton: Skeleton, index: int) -> None:
        self._skeleton, self._index = skeleton, index
        self._stack = ExitStack()
        self._seen: dict[str, torch.Tensor] = {}
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None
        self._chosen: dict[SubLayer, str] | None = None

    def __enter__(self) -> SubLayers:
        layer = self._skeleton.layers[self._index]
        for name, module in layer.named_children():
            if any(word in name for words in _WORDS.values() for word in words):
                handle = module.register_forward_hook(self._hook(name))
                self._stack.callback(handle.remove)
        self._stack.callback(layer.register_forward_hook(self._note).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._seen, self._ends = {}, None

    def added(self, which: SubLayer) -> torch.Tensor:
        """What the sub-layer added in the last call, (rows, n, D), as autograd knows it.

        Raises:
            IncompatibleError: no two modules of this layer add up to what it adds.

        """
        if self._chosen is None:
            self._chosen = self._choose()
        return self._seen[self._chosen[which]]

    @torch.no_grad()
    def _choose(self) -> dict[SubLayer, str]:
        """The two modules whose outputs miss ``h_out − h_in`` by the least, if by little enough."""
        assert self._ends is not None, "the layer has been called"
        entered, left = (end.detach().double() for end in self._ends)
        step = torch.finfo(self._ends[1].dtype).eps
        found: list[tuple[float, dict[SubLayer, str]]] = []
        for attn, mlp in product(self._named("attn"), self._named("mlp")):
            one, other = (self._seen[name].detach().double() for name in (attn, mlp))
            miss = (left - entered - one - other).abs()
            scale = entered.abs() + left.abs() + one.abs() + other.abs()
            far = float((miss / scale.clamp_min(torch.finfo(torch.float32).tiny)).max())
            found.append((far, {"attn": attn, "mlp": mlp}))
        best = min(found, key=lambda each: each[0], default=None)
        if best is None or not best[0] <= TOLERANCE * step:
            raise IncompatibleError(
                f"model family '{self._skeleton.family}': what attention and MLP of layer "
                f"{self._index + 1} add to the hidden state was not found among its modules",
                "take --interface block or hidden, which every family has",
            )
        return best[1]

    def _named(self, which: SubLayer) -> list[str]:
        """Modules of this sub-layer whose output could be added."""
        assert self._ends is not None
        shape = self._ends[1].shape
        return [
            name
            for name, output in self._seen.items()
            if output.shape == shape and any(word in name for word in _WORDS[which])
        ]

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                self._seen[name] = first

        return forward

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ends = (args[0], output[0] if isinstance(output, tuple) else output)


class RowsTap:
    """Keeps what a sub-layer adds at some positions of each seed, a file a layer.

    Args:
        skeleton: model that is swept.
        which: sub-layer.
        layers: those that are wanted, from 1.
        positions: of each seed.
        rows: spool of as many rows; `kept_rows` names a layer's file.

    """

    def __init__(
        self,
        skeleton: Skeleton,
        which: SubLayer,
        layers: set[int],
        positions: Sequence[torch.Tensor],
        rows: Spool,
    ) -> None:
        self._skeleton, self._which, self._layers = skeleton, which, layers
        self._positions, self._rows = positions, rows
        self._open: tuple[SubLayers, SeedWriter] | None = None

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """The file is there, whole and synced, when the block ends: before the layer's outputs."""
        if index + 1 not in self._layers:
            yield
            return
        with (
            SubLayers(self._skeleton, index) as caught,
            self._rows.writer(kept_rows(index + 1)) as out,
        ):
            self._open = caught, out
            try:
                yield
            finally:
                self._open = None

    def take(self, number: int, row: int = 0) -> None:
        """Write the positions of seed ``number``."""
        if self._open:
            caught, out = self._open
            out.write(number, caught.added(self._which)[row][self._positions[number]])


def kept_rows(index: int) -> str:
    """Name of the spool file with some rows of boundary ``index``, or of what layer it is adds."""
    return f"rows-{index:05d}"
