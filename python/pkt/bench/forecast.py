"""The seconds of an extraction from the rates of its parts: arithmetic alone, nothing is measured.

Reading overlaps with arithmetic where layers are read ahead, so a pass of L layers takes

    max(L·c + d, L·d + c)        c seconds of arithmetic and scoring a layer, d of reading it,

which is the slower side and one layer of the other; in turn it takes L·(c + d). Layers that the
slots hold when the order turns round are not read again; with --spool-every K each segment but the
last is read and run forward once more, by the steps of the sweep itself. Arithmetic and scoring
share the cores and add; so does what reading itself asks of them, in copies out of the page cache.
Windows are read while others are factorized: the slower of both counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pkt.schedule import Step, schedule, turns

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
    ends_bytes: int  #: embedding and head, read once
    window_bytes: int  #: read again for the factors
    boundary_bytes: int  #: a layer's inputs, all seeds: written once, read again in the backward
    boundaries_cached: bool  #: whether the page cache holds all that are kept at once
    cached_bytes: int = 0  #: of the layers, what the page cache holds when the order first turns
    every: int = 1  #: every k-th layer's inputs are kept, the others' made again
    segment_cached: bool = False  #: whether the page cache holds k layers from one use to the next
    ends_reads: int = 1  #: twice where embedding and head are scored too

    @property
    def again(self) -> int:
        """Layers that are run forward once more."""
        return sum(step.again for step in self._steps)

    @property
    def again_reads(self) -> int:
        """Of those, the ones that are read for it; the slots hold the others."""
        return sum(step.again for step in self._reads)

    @property
    def backward_reads(self) -> int:
        """Layers that are read for the backward pass; those of a cached segment once in all."""
        made = {step.layer for step in self._reads if step.again and self.segment_cached}
        reads = (step for step in self._reads if step.kind == "backward")
        return sum(step.layer not in made for step in reads)

    @property
    def cached_reads(self) -> int:
        """Bytes that the page cache gives of these two."""
        return min(self.cached_bytes, (self.again_reads + self.backward_reads) * self.layer_bytes)

    @property
    def flop(self) -> int:
        """8·P·tokens: forward twice, input and weight gradients; 2 for each again; the head's."""
        layers = (8 * self.layers + 2 * self.again) * self.layer_parameters * self.tokens
        return layers + 4 * self.head_parameters * self.loss_tokens

    @property
    def scored(self) -> int:
        """Scores added: parameters × seeds."""
        return self.layers * self.layer_parameters * self.seeds

    @property
    def read_bytes(self) -> int:
        """From the disk, for the teacher."""
        layers = (self.layers + self.again_reads + self.backward_reads) * self.layer_bytes
        ends = self.ends_reads * self.ends_bytes
        return layers - self.cached_reads + ends + self.window_bytes

    @property
    def spooled_bytes(self) -> int:
        """Boundaries written, and read again where the page cache does not hold them."""
        read = 0 if self.boundaries_cached else self.layers
        return (self.layers + self.again + read) * self.boundary_bytes

    @property
    def _steps(self) -> list[Step]:
        steps = schedule(self.layers, self.every)
        return [step for step in steps if step.kind in ("forward", "backward")]

    @property
    def _reads(self) -> list[Step]:
        steps = self._steps
        kept = turns([step.layer for step in steps], self.slots)
        return [step for step, held in zip(steps, kept, strict=True) if held is None]


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
    layers, again = work.layers, work.again
    read_again = 0 if work.boundaries_cached else layers * work.boundary_bytes
    cached_again = min(work.cached_reads, work.again_reads * work.layer_bytes)

    def sweep(name: str, compute: float, count: int, reads: int, more_bytes: int) -> Phase:
        disk = max(0, reads * work.layer_bytes + more_bytes) / pace.read
        arithmetic = count * compute + reads * work.layer_bytes * pace.reading_work
        seconds = disk + arithmetic
        if work.slots > 1:
            first = work.layer_bytes / pace.read if name == "forward" else 0.0
            seconds = max(arithmetic + first, disk + arithmetic / count)
        return Phase(name, seconds, disk, arithmetic)

    ends = work.ends_bytes / pace.read
    phases = [
        Phase("embedding and head", ends + pace.head, ends, pace.head),
        sweep("forward", pace.forward, layers, layers, layers * work.boundary_bytes),
    ]
    if again:
        written = again * work.boundary_bytes - cached_again
        phases.append(sweep("again", pace.forward, again, work.again_reads, written))
    more = read_again - (work.cached_reads - cached_again)
    phases.append(sweep("backward", pace.backward, layers, work.backward_reads, more))
    if pace.ends:
        phases.append(Phase("ends", ends + pace.ends, ends, pace.ends))
    windows = work.window_bytes / pace.windows
    factors = Phase("factors", max(windows, pace.factors), windows, pace.factors)
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
    disk = (work.read_bytes + work.spooled_bytes) / raw_read
    return max(disk, work.flop / flops + SCORE_BYTES * work.scored / copied)


def _bound(phases: Sequence[Phase], factors: Phase) -> Bound:
    if factors.seconds > sum(phase.seconds for phase in phases):
        return "factors"
    disk, arithmetic = (
        sum(getattr(phase, side) for phase in phases) for side in ("disk", "arithmetic")
    )
    return "disk" if disk > arithmetic else "arithmetic and scoring"
