"""Several processes of one run, as torchrun or accelerate starts them; one alone needs nothing.

What they share: sums, a part of the work each, and what they agree on. `joined` also keeps a watch:
each process says every few seconds that it lives, so that one which was killed, stopped or cut off
ends the others within a minute, however long an honest one may keep them waiting.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from pkt.errors import PktError, UsageError

Item = TypeVar("Item")

CHUNK_ELEMENTS = 1 << 22  # summed at once: what the backend holds beside the tensor stays small
BEAT_SECONDS = 5.0
MISSED_BEATS = 8  # in a row: 40 s of silence
MEET_SECONDS = 1800.0  # one host may still be fetching a model
_NO_LIMIT = datetime.timedelta(days=365)  # of one collective: the watch ends a wait in vain
_AGAIN = "run the same command again: it continues where it stopped"


def index() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return index() == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _joined():
        _finish(distributed.barrier(async_op=True))


def any_process(wish: bool, device: torch.device) -> bool:
    """Whether any process wishes it: all must save and stop at the same step."""
    return sum_over_processes([float(wish)], device)[0] > 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part: every n-th of ``items``."""
    if not _joined():
        return items
    return items[distributed.get_rank() :: distributed.get_world_size()]


def balanced_share(sizes: Sequence[int]) -> list[int]:
    """This process's part of the items of these ``sizes``, as ascending indices."""
    if not _joined():
        return list(range(len(sizes)))
    return balanced(sizes, distributed.get_world_size())[distributed.get_rank()]


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``sizes`` in parts of nearly equal sums, ascending within each.

    The largest first, each to the part that has least so far; ties go to the lower index, then to
    the lower part. With at least as many positive sizes as parts, none stays empty.
    """
    sums, found = [0] * parts, [[] for _ in range(parts)]  # type: tuple[list[int], list[list[int]]]
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(parts), key=lambda part: (sums[part], part))
        sums[least] += sizes[item]
        found[least].append(item)
    return [sorted(part) for part in found]


def sum_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sums in float64, the same in every process."""
    if not _joined():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    sum_in_place(total)
    return [float(number) for number in total]


def sum_in_place(tensor: torch.Tensor) -> None:
    """Replace ``tensor`` (contiguous) by its element-wise sum over the processes.

    Made in chunks of a constant size, without a copy of the whole; the same in every process and,
    for the same number of them, in every run.
    """
    if _joined():
        for chunk in tensor.view(-1).split(CHUNK_ELEMENTS):
            _finish(distributed.all_reduce(chunk, async_op=True))


def largest(number: int) -> int:
    """The largest ``number`` of any process."""
    if not _joined():
        return number
    found = torch.tensor(number, device=_place())
    _finish(distributed.all_reduce(found, distributed.ReduceOp.MAX, async_op=True))
    return int(found)


def everywhere(true: bool) -> bool:
    """Whether it is true in every process."""
    return not largest(int(not true))


def from_first(text: str) -> str:
    """The first process's ``text``."""
    if not _joined():
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=_place())
    size = largest(len(data) if is_first() else 0)
    if not is_first():
        data = torch.empty(size, dtype=torch.uint8, device=_place())
    _finish(distributed.broadcast(data, 0, async_op=True))
    return bytes(data.tolist()).decode()


@contextlib.contextmanager
def joined(count: int, device: str) -> Iterator[None]:
    """Belong to the ``count`` processes that the environment speaks of, while the block runs.

    gloo joins them on the CPU, NCCL on CUDA, a device each. One alone belongs to none, though its
    program may have joined others for purposes of its own.

    Raises:
        UsageError: the environment does not say where they meet, or devices are too few.
        PktError: another process has not come, has ended, or is no longer heard of.

    """
    global _alone, _watch
    if count == 1:
        before, _alone = _alone, True
        try:
            yield
        finally:
            _alone = before
        return
    try:
        store, rank, size = next(iter(rendezvous("env://")))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"WORLD_SIZE says {count} processes, but they cannot meet: {reason}",
            f"start them all: torchrun --nproc-per-node {count} -m pkt …; or unset WORLD_SIZE",
        ) from error
    on_cuda = device.split(":")[0] == "cuda"
    if on_cuda:
        _take_device(distributed.get_node_local_rank())
    watch = _Watch(store, rank, size)
    watch.meet()
    try:
        distributed.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_NO_LIMIT,
        )
    except RuntimeError as error:
        raise PktError(watch.loss(error), _AGAIN) from error
    _watch = watch
    before, _alone = _alone, False
    try:
        yield
    except BaseException:
        watch.leave()  # the group is left as it is: to destroy it might wait for who is gone
        raise
    finally:
        _alone = before
    watch.part()
    distributed.destroy_process_group()
    _watch = None


class _Watch:
    """What this process hears of the others, by way of the store in which they met."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(count) if other != rank]
        self._count = count
        self._ended = threading.Event()
        self.silent: str | None = None  #: who is no longer heard of

    def meet(self) -> None:
        """Return when all have come; begin to say and to hear that they live."""
        ours = self._store.clone()
        self._beat(ours, 0)
        since = time.monotonic()
        while away := [other for other in self._others if not ours.check([f"pkt/beat/{other}"])]:
            if time.monotonic() - since > MEET_SECONDS:
                raise PktError(
                    f"{self._name(away[0])} has not come within {MEET_SECONDS:.0f} s",
                    "its own messages say why; then start all again",
                )
            time.sleep(0.05)
        threading.Thread(target=self._listen, args=(ours,), name="pkt-beat", daemon=True).start()

    def loss(self, error: BaseException | None = None) -> str:
        """One line on why the others cannot be waited for any longer."""
        if self.silent:
            return self.silent
        for other in self._others:
            with contextlib.suppress(RuntimeError):
                if self._store.check([f"pkt/left/{other}"]):
                    return f"{self._name(other)} has ended with an error, which it prints itself"
        reason = str(error).splitlines()[0] if error else "no reason is known"
        return f"another of the {self._count} processes has ended or cannot be reached: {reason}"

    def leave(self) -> None:
        """Tell the others that this process has failed."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"pkt/left/{self._rank}", "1")

    def part(self) -> None:
        """Return when no process waits for another any more, or one is gone.

        A connection that is closed may fail a collective that has just ended on the other side,
        and the first process may hold the store itself.
        """
        awaited = self._others if self._rank == 0 else [0]
        with contextlib.suppress(RuntimeError):
            if self._rank:
                self._store.set(f"pkt/done/{self._rank}", "1")
            while not (self.silent or self._store.check([f"pkt/done/{each}" for each in awaited])):
                time.sleep(0.01)
            if self._rank == 0:
                self._store.set("pkt/done/0", "1")
        self._ended.set()

    def _listen(self, store: Any) -> None:
        """Counted in beats of our own, not by the clock: a whole run may be stopped for a while."""
        heard, missed, beat = dict.fromkeys(self._others, b""), dict.fromkeys(self._others, 0), 0
        store.set_timeout(datetime.timedelta(seconds=2 * BEAT_SECONDS))
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._beat(store, beat)
                for other in self._others:
                    said = store.get(f"pkt/beat/{other}")
                    missed[other] = missed[other] + 1 if said == heard[other] else 0
                    heard[other] = said
            except RuntimeError:
                self.silent = "the host where the processes met cannot be reached any more"
                return
            for other in self._others:
                if missed[other] >= MISSED_BEATS:
                    seconds = MISSED_BEATS * BEAT_SECONDS
                    self.silent = f"{self._name(other)} has not been heard of for {seconds:.0f} s"
                    return

    def _beat(self, store: Any, number: int) -> None:
        store.set(f"pkt/beat/{self._rank}", str(number))

    def _name(self, rank: int) -> str:
        return f"process {rank} (of 0 to {self._count - 1})"


_watch: _Watch | None = None  # beside torch's own group, of which there is one a process
_alone = False  # in a run of one process


def _finish(work: Any) -> None:
    """Wait for a collective as long as all are alive; signals are noticed meanwhile.

    Raises:
        PktError: another process is gone.

    """
    pause = 2e-5
    while not work.is_completed():
        if _watch and _watch.silent:
            raise PktError(_watch.silent, _AGAIN)
        time.sleep(pause)
        pause = min(1.5 * pause, 5e-3)
    try:
        work.wait()
    except RuntimeError as error:
        if _watch is None:
            raise
        raise PktError(_watch.loss(error), _AGAIN) from error


def _take_device(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--device cuda: expected a device for each process here, found "
            f"{torch.cuda.device_count()}",
            "start as many processes as there are devices",
        )
    torch.cuda.set_device(local_rank)


def _place() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _joined() -> bool:
    return not _alone and distributed.is_available() and distributed.is_initialized()
