"""How the model calls its layers for a text of a given length: masks, position embeddings.

transformers itself makes them, in a forward over recorders; the arguments of a length serve
every seed of that length in every layer. Only so many are kept, and made again when needed, so
that they do not grow with the seeds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pkt.sweep.skeleton import Call, Skeleton

KEPT_BYTES = 64 << 20


class Calls:
    """The calls of each length, the least recently used forgotten first.

    Args:
        skeleton: model whose forward is run.
        outer: its parameters outside the layers.
        width: D.
        dtype: of the hidden states.
        device: where they are.

    """

    def __init__(
        self,
        skeleton: Skeleton,
        outer: Mapping[str, torch.Tensor],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._skeleton, self._outer, self._width, self._dtype = skeleton, outer, width, dtype
        self._device = device
        self._kept: OrderedDict[int, list[Call]] = OrderedDict()

    def of(self, length: int, layer: int) -> Call:
        """The arguments of ``layer`` for a text of ``length`` tokens."""
        if length not in self._kept:
            rows = torch.zeros(length, self._width, dtype=self._dtype, device=self._device)
            with torch.no_grad():
                self._skeleton.prefix(rows, self._outer)
            self._kept[length] = self._skeleton.tape.calls
            while len(self._kept) > 1 and _bytes(self._kept) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(length)
        return self._kept[length][layer]

    def require_same(self, seen: list[Call], length: int) -> None:
        """Refuse a family whose layer arguments depend on more than the length of the text.

        Args:
            seen: the calls of a forward over a real text of ``length`` tokens.
            length: its tokens.

        Raises:
            IncompatibleError: they differ from those of a text of zeros.

        """
        for layer, real in enumerate(seen):
            ours, theirs = list(_tensors(real)), list(_tensors(self.of(length, layer)))
            same = len(ours) == len(theirs) and all(
                a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
            )
            if not same:
                raise self._skeleton.tape.refusal("gives its layers arguments made from the text")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bytes(kept: Mapping[int, list[Call]]) -> int:
    """Of distinct tensors: layers share them."""
    return sum({t.data_ptr(): t.nbytes for t in _tensors(kept)}.values())
