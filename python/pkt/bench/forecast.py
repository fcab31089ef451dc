"""The seconds of an extraction from the rates of its parts: arithmetic alone, nothing is measured.

Reading overlaps with arithmetic where layers are read ahead, so a pass of L layers takes

    max(L·c + d, L·d + c)        c seconds of arithmetic and scoring a layer, d of reading it,

which is the slower side and one layer of the other; in turn it takes L·(c + d). Layers that the
slots hold when the order turns round are not read again. Arithmetic and scoring share the cores
and add; so does what reading itself asks of them, in copies out of the page cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Bound = Literal["disk", "arithmetic and scoring", "factors"]

SCORE_BYTES = 14  # moved a parameter and seed: w, g made and read again, the score twice


@dataclass(frozen=True, slots=True)
class Work:
    """What a run has to do, from headers, plan and seeds."""

    layers: int
    layer_bytes: int  #: of one, as stored
    layer_parameters: int
    slots: int  #: as many layers stay in memory at the turn; more than one reads ahead
    seeds: int
    tokens: int
    loss_tokens: int
    head_parameters: int
    ends_bytes: int  #: embedding and head
    window_bytes: int  #: read again for the factors
    boundary_bytes: int  #: a layer's inputs, all seeds: written once, read again in the backward
    boundaries_cached: bool  #: whether the page cache holds the boundaries of all layers
    cached_bytes: int = 0  #: of the layers, what the page cache still holds for the backward pass

    @property
    def flop(self) -> int:
        """8·P·tokens: forward twice, input gradients, weight gradients; and the head's."""
        layers = 8 * self.layers * self.layer_parameters * self.tokens
        return layers + 4 * self.head_parameters * self.loss_tokens

    @property
    def scored(self) -> int:
        """Scores added: parameters × seeds."""
        return self.layers * self.layer_parameters * self.seeds

    @property
    def read_bytes(self) -> int:
        """From the disk, for the teacher."""
        layers = (self.layers + max(0, self.layers - self.slots)) * self.layer_bytes
        return layers - self.cached_bytes + self.ends_bytes + self.window_bytes


@dataclass(frozen=True, slots=True)
class Pace:
    """What this host was measured to take: seconds for all seeds of the run."""

    forward: float  #: a layer
    backward: float  #: a layer, with scoring and the choice of its windows
    head: float
    ends: float  #: column scores of embedding and head
    factors: float  #: all factorizations
    read: float  #: bytes a second
    windows: float  #: bytes a second, of matrices' parts
    reading_work: float = 0.0  #: seconds of all cores that reading a byte takes from arithmetic


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of the run, and what its seconds are made of."""

    name: str
    seconds: float
    disk: float  #: seconds that the disk is busy
    arithmetic: float  #: seconds that the cores are


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long each phase will take, and what binds the whole."""

    phases: tuple[Phase, ...]
    bound: Bound

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)


def forecast(work: Work, pace: Pace) -> Forecast:
    """The time of each phase of ``work`` at ``pace``.

    What binds is the phase ``factors`` where it takes half of the time, else whichever of disk
    and cores is busy longer in the rest.
    """
    kept = min(work.slots, work.layers)
    written = work.layers * work.boundary_bytes
    read_again = 0 if work.boundaries_cached else written

    def sweep(name: str, compute: float, reads: int, more_bytes: int) -> Phase:
        disk = max(0, reads * work.layer_bytes + more_bytes) / pace.read
        arithmetic = work.layers * compute + reads * work.layer_bytes * pace.reading_work
        seconds = disk + arithmetic
        if work.slots > 1:
            first = work.layer_bytes / pace.read if reads == work.layers else 0.0
            seconds = max(arithmetic + first, disk + arithmetic / work.layers)
        return Phase(name, seconds, disk, arithmetic)

    ends = work.ends_bytes / pace.read
    phases = [
        Phase("embedding and head", ends + pace.head, ends, pace.head),
        sweep("forward", pace.forward, work.layers, written),
        sweep("backward", pace.backward, work.layers - kept, read_again - work.cached_bytes),
    ]
    if pace.ends:
        phases.append(Phase("ends", ends + pace.ends, ends, pace.ends))
    windows = work.window_bytes / pace.windows
    factors = Phase("factors", windows + pace.factors, windows, pace.factors)
    return Forecast((*phases, factors), _bound(phases, factors))


def limit_seconds(work: Work, raw_read: float, flops: float, copied: float) -> float:
    """What no program could go below on this host: the larger of its two sides.

    max(bytes / raw disk rate, FLOP / matmul rate + scored × 14 B / copy bandwidth).

    Args:
        work: as in `forecast`.
        raw_read: bytes a second of the best plain parallel read.
        flops: of a large square product, in the type computed in.
        copied: bytes a second, read and written ones both counted.

    """
    spooled = work.layers * work.boundary_bytes * (1 if work.boundaries_cached else 2)
    disk = (work.read_bytes + spooled) / raw_read
    return max(disk, work.flop / flops + SCORE_BYTES * work.scored / copied)


def _bound(phases: Sequence[Phase], factors: Phase) -> Bound:
    if factors.seconds > sum(phase.seconds for phase in phases):
        return "factors"
    disk, arithmetic = (
        sum(getattr(phase, side) for phase in phases) for side in ("disk", "arithmetic")
    )
    return "disk" if disk > arithmetic else "arithmetic and scoring"
