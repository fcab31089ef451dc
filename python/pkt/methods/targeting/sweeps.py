"""The sweeps of a recording: each over the weights of one source, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pkt.errors import OutputError
from pkt.host import Costs, release_free_memory
from pkt.methods.targeting.kernels import LayerKernels
from pkt.methods.targeting.shards import LogitShards
from pkt.methods.targeting.states import LostRowsError, StateShards
from pkt.methods.targeting.task import DTYPES, Task
from pkt.models import Model
from pkt.records import Sample
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import AttributionSweep, ResidentSweep, Spool, Sweep, build_skeleton
from pkt.workplace import tensor_folder

MOST_REMADE = 3  # times that kept rows are made again

Notify = Callable[[str, int, int], None]


class Sweeps:
    """Sweeps of one model.

    Args:
        task: what is asked; its plan says how much is held.
        model: the teacher, or the student whose activations a map is fitted on.
        io: mmap, buffered or direct.
        device: where the arithmetic is done.
        notify: told of (phase, steps done, steps in all).
        costs: whose seconds by phase are added to.

    """

    def __init__(
        self,
        task: Task,
        model: Model,
        io: str,
        device: torch.device,
        notify: Notify,
        costs: Costs,
    ) -> None:
        dtype = DTYPES[task.config.dtype]
        self._task, self.model, self.notify, self.costs = task, model, notify, costs
        with costs.phase("skeleton"):
            self._skeleton = build_skeleton(model.folder, dtype, device)
        self.source = CheckpointSource(model.checkpoint, io, task.plan.slots, dtype, device)

    def spool(self, records: Path, texts: Sequence[Sample]) -> Spool:
        """The spool of a sweep over ``texts``, its records in ``records``."""
        return Spool(
            records,
            [len(text.tokens) for text in texts],
            self.model.hidden_size,
            DTYPES[self._task.config.dtype],
            tensor_folder(records, self._task.spool_dir),
        )

    def sweep(self, texts: Sequence[Sample], spool: Spool, notify: Notify | None = None) -> Sweep:
        """One that goes forward; ``notify``: told instead."""
        return Sweep(**self._parts(texts, spool, notify), batched="always")

    def attribution(self, texts: Sequence[Sample], records: Path) -> AttributionSweep:
        """One that attributes the loss to layers."""
        spool = self.spool(records, texts)
        return AttributionSweep(**self._parts(texts, spool), every=self._task.plan.spool_every)

    def resident(self, records: Path) -> ResidentSweep:
        """The whole teacher, for one text at a time."""
        lengths = [len(text.tokens) for text in self._task.texts]
        dtype = DTYPES[self._task.config.dtype]
        spool = Spool(records, lengths, self.model.hidden_size, dtype)
        sweep = ResidentSweep(**self._parts(self._task.texts, spool))
        sweep.hold()
        return sweep

    def release(self) -> None:
        """Give the memory of the layer slots back until the next sweep."""
        self.source.close()
        release_free_memory()

    def _parts(
        self, texts: Sequence[Sample], spool: Spool, notify: Notify | None = None
    ) -> dict[str, Any]:
        embedding = self.model.embedding
        row_bytes = embedding.bytes // embedding.shape[0]
        return {
            "skeleton": self._skeleton,
            "checkpoint": self.model.checkpoint,
            "seeds": texts,
            "spool": spool,
            "source": self.source,
            "device": self.source.device,
            "whole_layer": True,
            "chunk_rows": max(1, (self.source.slot_bytes - PAGE) // row_bytes),
            "notify": notify or self.notify,
            "seconds": self.costs.seconds,
        }


def pass_once(
    sweep: Sweep, logits: LogitShards, states: StateShards | None, kernels: LayerKernels | None
) -> None:
    """One pass, from wherever the spool stands; what is found damaged is made again."""
    depth, remade = len(sweep.skeleton.layers), 0
    while True:
        wanted = states.wanted() if states else set()
        wanted |= kernels.wanted() if kernels else set()
        if not logits.finished:
            wanted.add(depth)
        if not wanted:
            return
        if states:
            states.tap(sweep)
        visit = partial(_visit, sweep=sweep, logits=logits, states=states, kernels=kernels)
        visits = {index: partial(visit, index) for index in wanted}
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


def _visit(
    index: int,
    sweep: Sweep,
    logits: LogitShards,
    states: StateShards | None,
    kernels: LayerKernels | None,
) -> None:
    """What is left to do at one boundary."""
    if states:
        states.at(index, sweep)
    if kernels:
        kernels.at(index, sweep)
    if index == len(sweep.skeleton.layers) and not logits.finished:
        logits.write(sweep)
