"""How the teacher's states lie to one another at some places: one kernel a layer, kept on the disk.

Linear CKA with the student's layers, before and after it is trained, needs no more of the teacher:
a kernel has n² numbers, whatever the teacher's width. It is made as the layer's boundary passes by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pkt.durable import durable
from pkt.methods.targeting.places import first_places, of_teacher
from pkt.methods.targeting.shards import intact
from pkt.methods.targeting.task import Task
from pkt.similarity import LEAST_STATES, kernel
from pkt.sweep import Spool, Sweep, boundary
from pkt.targets import KERNEL_EXAMPLES, KERNEL_PLACES


class LayerKernels:
    """Writes the kernels of every layer of ``task``'s teacher, as far as they are not there.

    Args:
        task: examples and options.
        folder: of the files, which exists.
        spool: keeps a record of each finished file.

    """

    def __init__(self, task: Task, folder: Path, spool: Spool) -> None:
        places = first_places(task, KERNEL_EXAMPLES, KERNEL_PLACES)
        self.places = [(place.example, place.token) for place in places]
        self._read, self._folder, self._spool = of_teacher(task, places), folder, spool
        enough = len(places) >= LEAST_STATES
        self._layers = range(1, task.teacher.layers + 1) if enough else range(0)
        self._records: dict[int, dict[str, Any]] = {}
        for layer in self._layers:
            record = spool.get(_name(layer))
            if record is not None and intact(folder / _file(layer), record):
                self._records[layer] = record

    def wanted(self) -> set[int]:
        """The boundaries that have to come by."""
        return set(self._layers) - set(self._records)

    def at(self, index: int, sweep: Sweep) -> None:
        """The kernel of layer ``index``, from the boundary behind it in the spool of ``sweep``."""
        if index not in self.wanted():
            return
        parts = [
            sweep.spool.read(boundary(index), number)[positions]
            for number, positions in zip(self._read.numbers, self._read.positions, strict=True)
        ]
        made = kernel(torch.cat(parts).to(sweep.device)).float().cpu()
        data = save({"kernel": made}, metadata={"format": "pt"})
        with durable(self._folder / _file(index)) as file:
            file.write(data)
        self._records[index] = {"sha256": hashlib.sha256(data).hexdigest()}
        self._spool.put(_name(index), self._records[index])

    def index(self) -> dict[str, Any] | None:
        """What the targets' index says of them, JSON."""
        files = [
            {"file": _file(layer), "sha256": self._records[layer]["sha256"]}
            for layer in self._layers
        ]
        return {"places": self.places, "files": files} if files else None


def _name(layer: int) -> str:
    return f"kernel-{layer:05d}"


def _file(layer: int) -> str:
    return f"{_name(layer)}.safetensors"
