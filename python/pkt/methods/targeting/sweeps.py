"""Sweeps of one model, over the weights of one source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pkt.host import Costs, release_free_memory
from pkt.methods.targeting.task import DTYPES, Task
from pkt.models import Model
from pkt.records import Sample
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import AttributionSweep, ResidentSweep, Spool, Sweep, build_skeleton
from pkt.workplace import tensor_folder

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
        self._task, self.model, self._notify, self._costs = task, model, notify, costs
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
        return Sweep(**self._parts(texts, spool, notify), batched=True)

    def attribution(self, texts: Sequence[Sample], records: Path) -> AttributionSweep:
        """One that attributes the loss to layers."""
        spool = self.spool(records, texts)
        return AttributionSweep(**self._parts(texts, spool), every=self._task.plan.spool_every)

    def resident(self, texts: Sequence[Sample], records: Path) -> ResidentSweep:
        """The whole model, for one text at a time."""
        lengths = [len(text.tokens) for text in texts]
        spool = Spool(records, lengths, self.model.hidden_size, DTYPES[self._task.config.dtype])
        sweep = ResidentSweep(**self._parts(texts, spool))
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
            "notify": notify or self._notify,
            "seconds": self._costs.seconds,
        }
