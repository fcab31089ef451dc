"""Catching what a linear layer's weight gradient is made of, instead of the gradient.

For y = xWᵀ the gradient of W is dYᵀX: the input X is at hand when the layer is called, dY when
autograd comes back through it. Either goes straight to the observer, or, where the scores of a
whole layer do not fit in memory, to scratch files from which one matrix at a time is replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pkt.errors import IncompatibleError
from pkt.sweep.spool import Scratch, Spool

Sink = Callable[
    [str, torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]],
    Sequence[bool | torch.Tensor],
]


class Captures:
    """Hooks on the linear modules of one layer, for the time of a ``with`` block.

    Args:
        linears: by suffix; each must be called exactly once a forward.
        spool: gives scratch files when ``sink`` is ``None``.
        sink: takes module, weight, X and dY of each seed of a batch as soon as dY is there;
            false means not finite.

    """

    def __init__(self, linears: Mapping[str, nn.Linear], spool: Spool, sink: Sink | None) -> None:
        self._linears, self._spool, self._sink = linears, spool, sink
        self._stack = ExitStack()
        self._files: dict[str, tuple[Scratch, Scratch]] = {}  # module → its X and its dY
        self._owners: set[str] = set()  # modules whose X no other module has written already
        self._calls: Counter[str] = Counter()
        self._weights: Mapping[str, torch.Tensor] = {}
        self._seen: dict[str, torch.Tensor] = {}
        self._numbers: Sequence[int] = ()
        self.finite: dict[int, bool | torch.Tensor] = {}  #: by seed of the batch
        self.uncalled: str | None = None

    def __enter__(self) -> Captures:
        for name, module in self._linears.items():
            handle = module.register_forward_hook(self._hook(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def batch(self, numbers: Sequence[int], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """One forward and backward of the seeds ``numbers``, the shorter ones padded."""
        self._numbers, self._weights = numbers, weights
        self.finite = dict.fromkeys(numbers, True)
        self._seen, self.uncalled = {}, None
        self._calls.clear()
        yield
        self.uncalled = next((name for name in self._linears if self._calls[name] != 1), None)
        self._seen, self._numbers = {}, ()

    def replay(
        self, module: str, numbers: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """X and dY of some seeds, read back from the scratch files."""
        inputs, upstream = self._files[module]
        return [*map(inputs.read, numbers)], [*map(upstream.read, numbers)]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def forward(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not self._numbers:  # the layer is run between batches
                return
            self._calls[name] += 1
            self._seen[name] = args[0].detach()
            output.register_hook(lambda gradient: self._catch(name, gradient))

        return forward

    def _catch(self, name: str, gradient: torch.Tensor) -> None:
        xs, dys = self._apart(name, self._seen[name]), self._apart(name, gradient.detach())
        if self._sink is not None:
            found = self._sink(name, self._weights[f"{name}.weight"], xs, dys)
            for number, finite in zip(self._numbers, found, strict=True):
                self.finite[number] &= finite
            return
        if name not in self._files:
            shared = self._shared_input(name, xs[0])
            self._files[name] = (shared, self._open(f"dy-{name}", dys[0]))
        inputs, upstream = self._files[name]
        for number, x, dy in zip(self._numbers, xs, dys, strict=True):
            if name in self._owners:
                inputs.write(number, x)
            upstream.write(number, dy)

    def _apart(self, name: str, batch: torch.Tensor) -> list[torch.Tensor]:
        """The rows (n, width) of each seed, those of its padding left out."""
        lengths = [self._spool.lengths[number] for number in self._numbers]
        flat, rows = batch.flatten(0, -2), max(lengths)
        if flat.shape[0] != rows * len(lengths):
            raise IncompatibleError(
                f"{name}: expected one row a token, {rows * len(lengths)} in all, "
                f"found {flat.shape[0]}",
                "the layer-major sweep scores linear layers that see every token once",
            )
        parts = zip(flat.split(rows), lengths, strict=True)
        return [part[:length] for part, length in parts]

    def _shared_input(self, name: str, x: torch.Tensor) -> Scratch:
        """q, k and v are fed the same tensor: it is written once."""
        for other, (inputs, _) in self._files.items():
            seen = self._seen[other]
            if (seen.data_ptr(), seen.shape[-1]) == (x.data_ptr(), x.shape[-1]):
                return inputs
        self._owners.add(name)
        return self._open(f"x-{name}", x)

    def _open(self, name: str, like: torch.Tensor) -> Scratch:
        scratch = Scratch(self._spool.tensors / f"{name}.tmp", self._spool.lengths, like)
        self._stack.callback(scratch.close)
        return scratch
