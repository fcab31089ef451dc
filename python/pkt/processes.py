"""Several processes of one run, as torchrun or accelerate starts them; one alone needs nothing.

What they share: sums, a part of the work each, and what they agree on. Those that `joined` brings
together also watch each other, so that none waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from pkt.errors import PktError, UsageError
from pkt.watch import LEFT, Watch

Item = TypeVar("Item")

CHUNK_ELEMENTS = 1 << 22  # summed at once: what the backend holds beside the tensor stays small
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


def require_all() -> None:
    """Raise `PktError` if another process of the run is known to be gone."""
    if _watch and not _alone and _watch.lost:
        raise PktError(_watch.lost, _AGAIN)


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
    global _alone, _met, _watch
    if count == 1:
        before, _alone = _alone, True
        try:
            yield
        finally:
            _alone = before
        return
    try:
        store, rank, size = _attended(lambda: next(iter(rendezvous("env://"))))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"WORLD_SIZE says {count} processes, but they cannot meet: {reason}",
            f"start them all: torchrun --nproc-per-node {count} -m pkt …; or unset WORLD_SIZE",
        ) from error
    on_cuda = device.split(":")[0] == "cuda"
    if on_cuda:
        _take_device(distributed.get_node_local_rank())
    watch = Watch(store, rank, size)
    _met = True

    def connect() -> None:
        if on_cuda:
            _take_device(distributed.get_node_local_rank())  # of the thread that this runs in
        distributed.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_NO_LIMIT,
        )

    try:
        watch.meet()
        _attended(connect, watch)
    except RuntimeError as error:
        watch.leave()
        raise PktError(watch.loss(error), _AGAIN) from error
    except BaseException:
        watch.leave()
        raise
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
    if not watch.lost:
        distributed.destroy_process_group()
    _watch = None


def withdraw() -> None:
    """Tell the others, which may wait for this process, that it has failed before `joined`.

    It takes a few seconds if they cannot be told.
    """
    if _met:
        return
    soon = datetime.timedelta(seconds=10)
    with contextlib.suppress(Exception):  # this process has an error of its own to report
        store, rank, _ = _attended(lambda: next(iter(rendezvous("env://", timeout=soon))))
        store.set(LEFT.format(rank), "1")


_met = False  # others know of this process
_watch: Watch | None = None  # beside torch's own group, of which there is one a process
_alone = False  # in a run of one process


def _finish(work: Any) -> None:
    """Wait for a collective as long as all are alive; signals are noticed meanwhile.

    Raises:
        PktError: another process is gone.

    """
    pause = 2e-5
    while not work.is_completed():
        require_all()
        time.sleep(pause)
        pause = min(1.5 * pause, 5e-3)
    try:
        work.wait()
    except RuntimeError as error:
        if _watch is None:
            raise
        raise PktError(_watch.loss(error), _AGAIN) from error


def _attended(work: Callable[[], Item], watch: Watch | None = None) -> Item:
    """What ``work`` returns or raises; signals and losses are noticed meanwhile.

    torch waits inside such calls for as long as it takes, deaf to both.
    """
    found: list[Item] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="pkt-meet", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if thread.is_alive() and watch and watch.lost:
            raise PktError(watch.lost, _AGAIN)
    if raised:
        raise raised[0]
    return found[0]


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
