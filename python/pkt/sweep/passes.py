"""The layer-major sweep: every seed goes through layer i before any seed meets layer i + 1.

So the teacher is read at most twice, whatever the number of seeds: once forward, leaving each
layer's inputs in the spool, once backward, where each layer is recomputed with gradients. (Where
the disk has no room for the inputs of every layer, only each k-th one's are left, and the segment
between two is run forward once more.) What is done to a layer is in `pkt.sweep.layers`. Results do
not depend on slots, memory budget, k, or on where a killed run was continued; what is found damaged
when it is read is made again. Of several processes each sweeps seeds of its own; they meet where a
layer's scores are summed, and go on from the last layer that all of them have finished.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pkt.checkpoint import Piece
from pkt.errors import OutputError
from pkt.host import release_free_memory
from pkt.processes import largest
from pkt.products import bfloat16_products
from pkt.schedule import Step, forward_schedule, schedule
from pkt.sweep.ends import Accumulate, column_scores
from pkt.sweep.layers import LayerSteps
from pkt.sweep.names import boundary, record_of, upstream_of
from pkt.sweep.roles import Observer
from pkt.sweep.spool import DamagedError

MOST_REMADE = 3  # times that one process makes a damaged file again


class Sweep(LayerSteps):
    """The passes over a teacher: which steps are left, in order, and what is found damaged.

    Its fields are those of `LayerSteps`.
    """

    def run(self, observer: Observer) -> tuple[list[float], list[dict[str, Any]]]:
        """Both passes, from wherever the spool stands.

        Returns:
            the loss of each seed, and the observer's record of each layer.

        Raises:
            CheckpointError: a weight is NaN or infinite.
            PktError: a seed's loss or gradient is.
            OutputError: the work folder cannot be written.

        """
        depth = len(self.skeleton.layers)
        self._agree(depth)
        self._records = self._recorded(depth)
        while not self._undamaged(lambda: self._advance(observer)):
            pass
        return list(self.spool.get("losses") or []), self._records

    def forward(self, targets: Mapping[int, Callable[[], None]]) -> None:
        """One pass forward, from wherever the spool stands; the teacher is read once.

        Args:
            targets: by boundary, what is called while its file is in the spool (`boundary`): it
                leaves durable work, and may be called again if the file turns out to be damaged.

        Raises:
            As `run`.

        """
        left = dict(targets)

        def advance() -> None:
            every = range(len(self.skeleton.layers) + 1)
            held = [index for index in every if self.spool.holds(boundary(index))]
            self._walk(forward_schedule(left, held), None, left)

        while not self._undamaged(advance):
            pass

    def ends(self, accumulate: Accumulate) -> dict[str, list[float]]:
        """Column scores (D,) of embedding and head, from the spool that `run` has left."""
        record: dict[str, list[float]] | None = self.spool.get("ends")

        def score() -> None:
            nonlocal record
            with self._timed("ends"):
                record = column_scores(self, accumulate)
            self.spool.put("ends", record)

        while record is None:
            if not self._undamaged(score):
                while not self._undamaged(lambda: self._advance(None)):
                    pass
        return record

    def _undamaged(self, work: Callable[[], None]) -> bool:
        """Do ``work``; false if it met a damaged file, which is dropped: it is made again."""
        try:
            with bfloat16_products(self.device, self.spool.dtype):
                work()
        except DamagedError as damage:
            if self._remade[damage.name] == MOST_REMADE:
                raise OutputError(
                    f"{damage.message}, though it was made again {MOST_REMADE} times",
                    "the disk is unreliable: continue on another with --spool-dir",
                ) from damage
            self._remade[damage.name] += 1
            self.spool.drop(damage.name)
            return False
        return True

    def _advance(self, observer: Observer | None) -> None:
        """Every step that is left; ``None``: the layers are scored, only files are lacking."""
        depth = len(self.skeleton.layers)
        pending = depth - len(self._records)
        last = self.keep_last and self.spool.get("ends") is None
        upstream = self._upstream(pending, depth, needed=pending > 0 or last)
        for index in {*range(depth + 1)} - {upstream}:
            self.spool.drop(upstream_of(index))
        steps = schedule(
            depth,
            self.every,
            held=[index for index in range(depth + 1) if self.spool.holds(boundary(index))],
            pending=pending,
            upstream=upstream,
            last=last,
        )
        self._walk(steps, observer)

    def _upstream(self, pending: int, depth: int, *, needed: bool) -> int | None:
        """The lowest boundary from ``pending`` on whose gradients are there, or are not needed."""
        if self.spool.get("losses") is None:
            return None
        if not needed:
            return pending
        there = (u for u in range(pending, depth + 1) if self.spool.holds(upstream_of(u)))
        return next(there, None)

    def _walk(
        self,
        steps: Sequence[Step],
        observer: Observer | None,
        targets: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        """Take the steps; of ``targets`` those that were made are taken out."""
        depth = len(self.skeleton.layers)
        chunks = self.placement.embedding_chunks()
        jobs: list[tuple[str, dict[str, Piece]]] = []
        for step in steps:
            if step.kind == "embed":
                jobs += [("embedding", {"rows": piece}) for piece in chunks]
            elif step.kind in ("forward", "backward"):
                jobs.append((f"layer {step.layer}", self.placement.layer(step.layer)))
        weights = self.source.jobs(jobs)
        totals = Counter(_phase(step) for step in steps)
        done = Counter({"backward": depth - totals["backward"]})
        totals["backward"] = depth
        for step in steps:
            phase = _phase(step)
            for index in step.drops:
                self.spool.drop(boundary(index))
            with self._timed(phase):
                if step.kind == "embed":
                    self._embed(weights, chunks)
                elif step.kind == "forward":
                    self._forward(step.layer, next(weights))
                elif step.kind == "head":
                    self._head(depth)
                elif step.kind == "targets":
                    assert targets is not None
                    targets[step.layer]()
                    del targets[step.layer]
                else:
                    scored = None if step.again else observer
                    self._backward(step.layer, next(weights), scored)
            if step.kind in ("forward", "backward"):
                release_free_memory()
                done[phase] += 1
                self.notify(phase, done[phase], totals[phase])

    def _agree(self, depth: int) -> None:
        """Several processes go on together: records that others of them lack are removed."""
        ours = len(self._recorded(depth))
        common = depth - largest(depth - ours)
        for index in range(depth - ours, depth - common):
            self.spool.forget(record_of(index))

    def _recorded(self, depth: int) -> list[dict[str, Any]]:
        """Records of the layers that are done: an unbroken run down from the last layer."""
        records: list[dict[str, Any]] = []
        for index in reversed(range(depth)):
            record = self.spool.get(record_of(index))
            if record is None or not self.intact(record):
                break
            records.insert(0, record)
        return records

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _phase(step: Step) -> str:
    """What the step is called where progress and seconds are told."""
    return "again" if step.again and step.kind in ("forward", "backward") else step.kind
