"""Reading ahead: whole jobs (a layer's tensors) into a few slots, in the order asked for.

torch owns the memory, the Rust core fills it without the GIL, and tensors are views of it: no
copy lies between the disk and the model, except where the checkpoint's element type is not the
one computed in, and on CUDA, where a copy stream carries the locked slot to the device while the
layer before it is at work (never yet run on a GPU). Where the order turns round, as from the
forward to the backward pass, the jobs that the slots hold then are handed out again instead of
being read again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pkt import _core
from pkt.checkpoint import Checkpoint, Piece
from pkt.config import READ_THREADS, format_bytes
from pkt.errors import BudgetError
from pkt.schedule import turns

TURNED = 1 << 22  # weights of float16 made bfloat16 at once
PAGE = 4096  # O_DIRECT wants memory and file offsets that agree modulo this

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """Tensors that are read together, by the names under which they are handed out."""

    label: str
    pieces: dict[str, Piece]

    def layout(self) -> _core.Layout:
        """Where each piece lies in a slot."""
        return layout(list(self.pieces.values()))


def layout(pieces: Sequence[Piece]) -> _core.Layout:
    """Places of ``pieces`` in a slot, and the positional reads that fill it."""
    return _core.layout([(p.shard, p.begin, p.end, _core.dtype_bytes(p.dtype)) for p in pieces])


def arena(size: int) -> torch.Tensor:
    """``size`` bytes whose first byte lies on a page boundary, dtype uint8."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:size]


class CheckpointSource:
    """The weights of one checkpoint, for a sweep: a stream of jobs, and reads out of turn.

    Args:
        checkpoint: validated files.
        mode: mmap, buffered or direct.
        slots: layer slots of the stream; one means reading and computing take turns.
        dtype: computed in; tensors of another float type are converted.
        device: where the tensors are wanted.

    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mode: str,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        files = [(str(path), size) for path, size in checkpoint.files]
        self._reader = _core.Reader(files, mode, READ_THREADS)
        checkpoint.require_unchanged()  # from here on the reader itself sees to it
        self._slots, self._dtype, self.device = slots, dtype, device
        self._stream: WeightStream | None = None
        self._handed_out: Generator[dict[str, torch.Tensor]] | None = None
        self._counts: dict[str, Any] = {"bytes": 0, "read_seconds": 0.0}  # of closed streams
        self.slot_bytes = max(layout(list(p.values())).bytes for p in checkpoint.layers)

    @property
    def mode(self) -> str:
        """The reading mode in use."""
        return self._reader.mode

    @property
    def notices(self) -> list[str]:
        """What the user should know, such as a refused direct mode."""
        return self._reader.notices

    def jobs(
        self, labels: Sequence[tuple[str, dict[str, Piece]]]
    ) -> Generator[dict[str, torch.Tensor]]:
        """The weights of each job in order, valid until the next is asked for.

        A stream that is still open ends: its weights are valid no more.
        """
        self.close()
        jobs = [Job(label, pieces) for label, pieces in labels]
        self._stream = WeightStream(
            self._reader, jobs, self._slots, self.slot_bytes, self._dtype, self.device
        )
        self._handed_out = iter(self._stream)
        return self._handed_out

    def read(self, pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        """Some tensors now, in memory of their own."""
        plan = layout(list(pieces.values()))
        memory = arena(plan.bytes)
        self._reader.read(plan, memory.numpy())
        tensors = _views(memory, plan, pieces, self._dtype)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def window(self, piece: Piece, rows: range, cols: range) -> torch.Tensor:
        """Rows × columns of a matrix, on the CPU, as stored; only their bytes are read."""
        item = _core.dtype_bytes(piece.dtype)
        memory = arena(len(rows) * len(cols) * item)
        extent = (piece.shard, piece.begin, piece.end, item)
        shape = (piece.shape[0], piece.shape[1])
        span = (rows.start, rows.stop), (cols.start, cols.stop)
        self._reader.read_rows(extent, shape, *span, memory.numpy())
        return memory.view(TORCH_DTYPES[piece.dtype]).view(len(rows), len(cols))

    def counts(self) -> dict[str, Any]:
        """Bytes and seconds of the stream, and the bytes read out of turn."""
        counts = _sum(self._counts, self._stream.counts()) if self._stream else self._counts
        return {**counts, "bytes_out_of_turn": self._reader.bytes}

    def close(self) -> None:
        """Stop reading ahead and give the slots' memory back."""
        if self._stream and self._handed_out:
            self._handed_out.close()  # on CUDA its thread may be waiting for the stream
            self._counts = _sum(self._counts, self._stream.counts())
            self._stream.close()
            self._stream = None


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: one.get(name, 0) + value for name, value in other.items()}


class WeightStream:
    """Hands out the jobs' tensors in order; while one is in use, the next are being read.

    Args:
        reader: open shards.
        jobs: what is wanted, in order.
        slots: number of slots; one means reading and computing take turns.
        slot_bytes: size of each, at least that of the largest job.
        dtype: computed in; tensors of another float type are converted.
        device: where the tensors are wanted.

    """

    def __init__(
        self,
        reader: _core.Reader,
        jobs: Sequence[Job],
        slots: int,
        slot_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._jobs = list(jobs)
        self._layouts = [job.layout() for job in jobs]
        self._kept_from = turns([job.pieces for job in jobs], slots)
        self._wanted_again = {use for use in self._kept_from if use is not None}
        self._kept: dict[int, int] = {}  # use → the slot that still holds it
        self._dtype, self._device = dtype, device
        self._slots = [arena(slot_bytes) for _ in range(slots)]
        self._waits, self._waited = 0, 0.0  # of a consumer for a copy on the device
        if device.type == "cuda":
            _lock(self._slots)
        reads = [
            plan for plan, kept in zip(self._layouts, self._kept_from, strict=True) if kept is None
        ]
        self._core = _core.Stream(reader, [slot.numpy() for slot in self._slots], reads)

    def __iter__(self) -> Generator[dict[str, torch.Tensor]]:
        """Yield each job's tensors; they are valid until the next one is asked for."""
        if self._device.type == "cuda":
            yield from self._on_device()
            return
        for use in range(len(self._jobs)):
            slot = self._take(use)
            yield self._tensors(use, slot)
            self._give_back(use, slot)

    def counts(self) -> dict[str, Any]:
        """Bytes read, seconds reading, times and seconds that the consumer had to wait."""
        counts = dict(self._core.counts())
        if self._device.type == "cuda":  # there it is the copying thread that waits for the disk
            counts |= {"stalls": self._waits, "stall_seconds": self._waited}
        return counts

    def close(self) -> None:
        """Stop reading at once and give the slots back."""
        self._core.close()
        if self._device.type == "cuda":
            _unlock(self._slots)
        self._slots.clear()

    def _take(self, use: int) -> int:
        """The slot that holds this job: kept since an earlier use, or filled now."""
        kept = self._kept_from[use]
        if kept is not None:
            return self._kept.pop(kept)
        lease = self._core.next()
        assert lease is not None, "the stream reads as many jobs as it was given"
        return int(lease[1])

    def _give_back(self, use: int, slot: int) -> None:
        if use in self._wanted_again:
            self._kept[use] = slot
        else:
            self._core.release(slot)

    def _tensors(self, use: int, slot: int) -> dict[str, torch.Tensor]:
        return _views(
            self._slots[slot], self._layouts[use], self._jobs[use].pieces, self._dtype,
            turned=self._kept_from[use] is not None,
        )  # fmt: skip

    def _on_device(self) -> Generator[dict[str, torch.Tensor]]:
        """One job ahead: read, then copied by a stream of its own while the last one is used.

        Elements are converted on the device: fewer bytes are copied, and from locked memory. A
        slot is given back when its copy is done; what was copied belongs to the copying stream's
        pool and is not used again there before the consumer's stream is through with it.
        """
        copies = torch.cuda.Stream(self._device)

        def fetch(use: int) -> dict[str, torch.Tensor] | None:
            if use == len(self._jobs):
                return None
            slot = self._take(use)
            host = _views(self._slots[slot], self._layouts[use], self._jobs[use].pieces, None)
            with torch.cuda.stream(copies):
                tensors = {
                    name: tensor.to(copies.device, non_blocking=True).to(self._dtype)
                    for name, tensor in host.items()
                }
            copies.synchronize()
            self._give_back(use, slot)
            return tensors

        with ThreadPoolExecutor(1, "pkt-copy") as pool:
            ahead = pool.submit(fetch, 0)
            for use in range(len(self._jobs)):
                self._waits += not ahead.done()
                start = time.perf_counter()
                tensors = ahead.result()
                self._waited += time.perf_counter() - start
                assert tensors is not None
                for tensor in tensors.values():
                    tensor.record_stream(torch.cuda.current_stream(copies.device))
                ahead = pool.submit(fetch, use + 1)
                yield tensors


def _lock(slots: Sequence[torch.Tensor]) -> None:
    """Keep the slots where they are, so that a device copies out of them by itself.

    torch's own pinned memory would be rounded up to a power of two, and held when it is freed.
    """
    cuda = torch.cuda.cudart()
    for at, slot in enumerate(slots):
        if int(error := cuda.cudaHostRegister(slot.data_ptr(), slot.nbytes, 0)):
            _unlock(slots[:at])
            raise BudgetError(
                f"a layer slot of {format_bytes(slot.nbytes)} cannot be locked in memory for "
                f"copies to the device: {cuda.cudaGetErrorString(error)}",
                "a smaller --max-ram has fewer slots",
            )


def _unlock(slots: Sequence[torch.Tensor]) -> None:
    for slot in slots:
        torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())


def _views(
    memory: torch.Tensor,
    plan: _core.Layout,
    pieces: dict[str, Piece],
    dtype: torch.dtype | None,
    turned: bool = False,
) -> dict[str, torch.Tensor]:
    """The pieces in ``memory``, in ``dtype`` or, if ``None``, as they are stored.

    ``turned``: its float16 has been made bfloat16 before.
    """
    tensors = {}
    for (name, piece), place in zip(pieces.items(), plan.places, strict=True):
        raw = memory[place : place + piece.bytes]
        view = raw.view(TORCH_DTYPES[piece.dtype]).view(piece.shape)
        if view.dtype == torch.float16 and dtype == torch.bfloat16:
            here = view.view(dtype)  # same size: in place
            view = here if turned else _turned(view, here)
        tensors[name] = view if dtype is None else view.to(dtype)
    return tensors


def _turned(stored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``target``, over the same memory, as what is ``stored``; block by block, without a copy."""
    for old, new in zip(stored.view(-1).split(TURNED), target.view(-1).split(TURNED), strict=True):
        new.copy_(old.to(target.dtype))
    return target
