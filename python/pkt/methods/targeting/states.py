"""The teacher's mapped activations, a file for each shard and student layer: a durable step each.

What a target is made of (`pkt.pairing.sources`) passes by one boundary after another: rows that a
later boundary needs are kept until then, raw and in the type computed in, and dropped once used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.durable import durable
from pkt.methods.targeting.shards import intact
from pkt.methods.targeting.task import SUB_LAYERS, Carry, Task
from pkt.pairing import all_sources
from pkt.records import LayerPair
from pkt.sweep import DamagedError, RowsTap, Spool, Sweep, boundary, kept_rows
from pkt.targets import Shard, StatesIndex, pack_states, stored_states


class LostRowsError(Exception):
    """Kept rows are gone or damaged: an earlier boundary has to come by again."""

    def __init__(self, damage: DamagedError) -> None:
        super().__init__(damage.message)
        self.damage = damage


@dataclass(frozen=True)
class _Target:
    """What one student layer is given."""

    student: int
    terms: dict[int, float]  #: factors by source
    shards: list[Shard]

    @property
    def end(self) -> int:
        """The boundary at which everything is there."""
        return max(self.terms)


class StateShards:
    """Writes the states of ``pairs`` into ``folder``, as far as they are not there.

    Args:
        task: examples and options.
        pairs: of layers.
        carry: M (D_S, D_T) float32 of a student layer.
        folder: of the shards, which exists.
        spool: keeps a record of each finished shard; its tensor files' folder holds kept rows too.

    """

    def __init__(
        self,
        task: Task,
        pairs: Sequence[LayerPair],
        carry: Carry,
        folder: Path,
        spool: Spool,
    ) -> None:
        assert task.states
        assert task.student
        self._task, self._carry, self._folder, self._spool = task, carry, folder, spool
        aligned = task.aligned.tokens if task.aligned else None
        states = task.states
        self.index = StatesIndex(
            states.interface, states.map, states.dtype, task.student.hidden_size, tuple(pairs),
            aligned,
        )  # fmt: skip
        self._taps = states.interface in SUB_LAYERS
        depths = task.teacher.layers, task.student.layers
        self._targets = [
            _Target(pair.student, terms, self.index.layout(task.answers, pair.student))
            for pair, terms in zip(
                pairs, all_sources(pairs, states.interface, *depths), strict=True
            )
        ]
        self._positions = task.positions
        lengths = [len(positions) for positions in self._positions]
        self._rows = Spool(spool.folder, lengths, spool.width, spool.dtype, spool.tensors)
        self._records: dict[str, dict[str, Any]] = {}
        for target in self._targets:
            for shard in target.shards:
                record = spool.get(_record(shard))
                if record is not None and intact(folder / shard.file, record):
                    self._records[shard.file] = record

    @property
    def finished(self) -> bool:
        """Whether every file is there."""
        return not self._left()

    def wanted(self) -> set[int]:
        """The boundaries that have to come by: where something is kept, or a target made."""
        found: set[int] = set()
        for target in self._left():
            found.add(target.end)
            for source in target.terms:
                needs_file = self._taps or source < target.end
                if needs_file and not self._rows.holds(kept_rows(source)):
                    found.add(source - 1 if self._taps else source)
        return found

    def tap(self, sweep: Sweep) -> None:
        """Have ``sweep`` keep what sub-layers add, where that is wanted."""
        if self._taps:
            which: Any = self.index.interface
            layers = {source for target in self._left() for source in target.terms}
            sweep.tap = RowsTap(sweep.skeleton, which, layers, self._positions, self._rows)

    def at(self, index: int, sweep: Sweep) -> None:
        """Keep what is needed of boundary ``index``, in the spool of ``sweep``; make what can be.

        Raises:
            LostRowsError: what was kept before is not there any more.
            PktError: a state cannot be stored.

        """
        left = self._left()
        later = any(index in target.terms and index < target.end for target in left)
        if later and not self._taps and not self._rows.holds(kept_rows(index)):
            with self._rows.writer(kept_rows(index)) as out:
                for number in range(len(self._positions)):
                    out.append(self._read(sweep, index, index, number))
        for target in left:
            if target.end == index:
                self._write(target, sweep)
        self._drop()

    def forget(self, name: str) -> None:
        """A file of kept rows is damaged: it is made again."""
        self._rows.drop(name)

    def files(self) -> list[tuple[int, Shard, str]]:
        """Student layer, shard and SHA-256 of each file, for the index."""
        return [
            (target.student, shard, str(self._records[shard.file]["sha256"]))
            for target in self._targets
            for shard in target.shards
        ]

    @property
    def rounding(self) -> float:
        """The largest relative error of storing, ‖x̃ − x‖ / ‖x‖, of any row."""
        return max((float(record["rounding"]) for record in self._records.values()), default=0.0)

    def _left(self) -> list[_Target]:
        return [
            target
            for target in self._targets
            if any(shard.file not in self._records for shard in target.shards)
        ]

    def _write(self, target: _Target, sweep: Sweep) -> None:
        """The files of one student layer: ``M a`` of each row, in float32, then rounded."""
        matrix = self._carry(target.student).to(sweep.device).T
        for shard in target.shards:
            if shard.file in self._records:
                continue
            parts = [torch.empty(0, self.index.width, dtype=torch.float32)]
            parts[0], rounding = stored_states(parts[0], self.index.dtype)
            for example in range(shard.first, shard.first + shard.examples):
                text = self._task.text_of(example)
                if text is None:
                    continue
                state: torch.Tensor | None = None
                for source, factor in target.terms.items():
                    rows = factor * self._read(sweep, target.end, source, text).float()
                    state = rows if state is None else state + rows
                assert state is not None
                mapped = (state.to(sweep.device) @ matrix).cpu()
                kept, error = stored_states(mapped, self.index.dtype)
                parts.append(kept)
                rounding = max(rounding, error)
            data = pack_states(parts)
            with durable(self._folder / shard.file) as file:
                file.write(data)
            record = {"sha256": hashlib.sha256(data).hexdigest(), "rounding": rounding}
            self._spool.put(_record(shard), record)
            self._records[shard.file] = record
            sweep.notify("states", len(self._records), sum(len(t.shards) for t in self._targets))

    def _read(self, sweep: Sweep, index: int, source: int, text: int) -> torch.Tensor:
        """The rows of one text: of the boundary in the spool, or kept before."""
        if source == index and not self._taps:
            return sweep.spool.read(boundary(index), text)[self._positions[text]]
        with _found_again():
            return self._rows.read(kept_rows(source), text)

    def _drop(self) -> None:
        """Rows that no target needs any more."""
        needed = {source for target in self._left() for source in target.terms}
        for target in self._targets:
            for source in target.terms:
                if source not in needed:
                    self._rows.drop(kept_rows(source))


@contextmanager
def _found_again() -> Iterator[None]:
    try:
        yield
    except DamagedError as damage:
        raise LostRowsError(damage) from damage


def _record(shard: Shard) -> str:
    return shard.file.removesuffix(".safetensors")
