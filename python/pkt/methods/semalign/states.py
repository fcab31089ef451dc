"""Hidden states of both models at the same places of the same texts, one model after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pkt.methods.semalign.task import DTYPES, Texts
from pkt.models import Model
from pkt.stream import PAGE, CheckpointSource
from pkt.sweep import Spool, StatesSweep, boundary, build_skeleton
from pkt.sweep.skeleton import attention_kinds


@dataclass(frozen=True)
class States:
    """The kept states of one model, on the disk."""

    spool: Spool
    layers: int
    kinds: tuple[str, ...]  #: attention of each layer
    bytes_read: int

    def after(self, layer: int) -> torch.Tensor:
        """What leaves ``layer``, from 1 (0: what enters the first), (P, D) float32."""
        blocks = [
            self.spool.read(boundary(layer), index) for index in range(len(self.spool.lengths))
        ]
        return torch.cat(blocks).float()


def sweep_states(
    model: Model,
    texts: Texts,
    folder: Path,
    *,
    dtype: str,
    io: str,
    slots: int,
    device: str,
    notify: Callable[[str, int, int], None],
    seconds: dict[str, float],
) -> States:
    """Stream ``model`` once over its texts, and keep the wanted positions of every layer.

    Args:
        model: opened.
        texts: as it reads them.
        folder: for hidden states; exists.
        dtype: computed in, "F32" or "BF16".
        io: mmap, buffered or direct.
        slots: layer slots.
        device: "cpu" or "cuda".
        notify: told of (phase, steps done, steps in all).
        seconds: by phase, added to.

    """
    place, kind = torch.device(device), DTYPES[dtype]
    skeleton = build_skeleton(model.folder, kind, place)
    source = CheckpointSource(model.checkpoint, io, slots, kind, place)
    chosen = [number for number, wanted in enumerate(texts.positions) if wanted]
    samples = [texts.samples[number] for number in chosen]
    positions = [torch.tensor(texts.positions[number]) for number in chosen]
    width = model.hidden_size
    row_bytes = model.embedding.bytes // model.embedding.shape[0]
    states = Spool(folder / "states", [len(each) for each in positions], width, kind)
    sweep = StatesSweep(
        skeleton=skeleton,
        checkpoint=model.checkpoint,
        seeds=samples,
        spool=Spool(folder / "sweep", [len(s.tokens) for s in samples], width, kind),
        source=source,
        device=place,
        whole_layer=False,
        batched="always",
        chunk_rows=max(1, (source.slot_bytes - PAGE) // row_bytes),
        every=model.layers + 1,
        notify=notify,
        seconds=seconds,
    )
    try:
        sweep.leave(positions, states)
    finally:
        source.close()
    counts = source.counts()
    read = counts["bytes"] + counts["bytes_out_of_turn"]
    return States(states, model.layers, attention_kinds(model.folder, model.layers), read)
