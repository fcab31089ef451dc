"""What is taken of a layer on the way forward, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from pkt.sublayers import SubLayer, SubLayers
from pkt.sweep.names import kept_rows
from pkt.sweep.skeleton import Skeleton
from pkt.sweep.spool import SeedWriter, Spool


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
            self._skeleton.sublayers(index) as caught,
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
