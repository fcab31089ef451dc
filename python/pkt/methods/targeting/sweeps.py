"""The sweeps of a recording: each over the weights of one source, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pkt.errors import OutputError
from pkt.host import Costs, release_free_memory
from pkt.methods.targeting.shards import LogitShards
from pkt.methods.targeting.states import LostRowsError, StateShards
from pkt.methods.targeting.task import DTYPES, Task
from pkt.records import Sample
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import AttributionSweep, ResidentSweep, Spool, Sweep
from pkt.workplace import tensor_folder

MOST_REMADE = 3  # times that kept rows are made again

Notify = Callable[[str, int, int], None]


class Sweeps:
    """Sweeps of one teacher, over the weights of one source."""

    def __init__(
        self,
        task: Task,
        skeleton: Any,
        source: CheckpointSource,
        notify: Notify,
        costs: Costs,
    ) -> None:
        self._task, self._skeleton, self._source = task, skeleton, source
        self._notify, self._costs = notify, costs

    def spool(self, records: Path, texts: Sequence[Sample]) -> Spool:
        """A spool of these texts, whose tensor files lie where the user wants them."""
        return Spool(
            records,
            [len(text.tokens) for text in texts],
            self._task.teacher.hidden_size,
            DTYPES[self._task.config.dtype],
            tensor_folder(records, self._task.spool_dir),
        )

    def sweep(self, texts: Sequence[Sample], spool: Spool) -> Sweep:
        """A sweep that goes forward."""
        return Sweep(**self._parts(texts, spool), batched=True)

    def attribution(self, texts: Sequence[Sample], records: Path) -> AttributionSweep:
        """A sweep that attributes; its spool lies in a folder of its own."""
        spool = self.spool(records, texts)
        return AttributionSweep(**self._parts(texts, spool), every=self._task.plan.spool_every)

    def resident(self, records: Path) -> ResidentSweep:
        """The whole teacher, for one text at a time."""
        lengths = [len(text.tokens) for text in self._task.texts]
        dtype = DTYPES[self._task.config.dtype]
        spool = Spool(records, lengths, self._task.teacher.hidden_size, dtype)
        sweep = ResidentSweep(**self._parts(self._task.texts, spool))
        sweep.hold()
        return sweep

    def release(self) -> None:
        """Give the memory of the layer slots back until the next sweep."""
        self._source.close()
        release_free_memory()

    def forward(self, sweep: Sweep, logits: LogitShards, states: StateShards | None) -> None:
        """One pass, from wherever the spool stands; what is found damaged is made again."""
        depth, remade = self._task.teacher.layers, 0
        while True:
            wanted = states.wanted() if states else set()
            if not logits.finished:
                wanted.add(depth)
            if not wanted:
                return
            if states:
                states.tap(sweep)
            visits = {index: partial(_visit, index, sweep, logits, states) for index in wanted}
            try:
                sweep.forward(visits)
            except LostRowsError as lost:
                remade += 1
                if remade > MOST_REMADE or not states:
                    raise OutputError(
                        f"{lost.damage.message}, though it was made again {MOST_REMADE} times",
                        "the disk is unreliable: continue on another with --spool-dir",
                    ) from lost
                states.forget(lost.damage.name)

    def _parts(self, texts: Sequence[Sample], spool: Spool) -> dict[str, Any]:
        embedding = self._task.teacher.embedding
        row_bytes = embedding.bytes // embedding.shape[0]
        return {
            "skeleton": self._skeleton,
            "checkpoint": self._task.teacher.checkpoint,
            "seeds": texts,
            "spool": spool,
            "source": self._source,
            "device": self._source.device,
            "whole_layer": True,
            "chunk_rows": max(1, (self._source.slot_bytes - PAGE) // row_bytes),
            "notify": self._notify,
            "seconds": self._costs.seconds,
        }


def _visit(index: int, sweep: Sweep, logits: LogitShards, states: StateShards | None) -> None:
    """What is left to do at one boundary."""
    if states:
        states.at(index, sweep)
    if index == len(sweep.skeleton.layers) and not logits.finished:
        logits.write(sweep)
