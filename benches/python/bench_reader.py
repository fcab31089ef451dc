"""The reader beside a raw parallel read of the same file, and beside safetensors' own loading.

Cold cache: every run drops the page cache first (needs root). "raw" is 8 threads of plain
preadv of 8 MiB each into one buffer, with and without O_DIRECT, whichever is faster. Modes are
run in turn, several rounds; medians are compared. With --cgroup-bytes the loaders run inside a
memory cgroup (v1) of that size, smaller than the file.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pkt import _core
from pkt.stream import arena
from record import machine, make, write_record

CHUNK = 8 << 20
SLOT = 512 << 20


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def raw(path: str, direct: bool) -> float:
    """Seconds of a parallel read of the whole file into one slot-sized buffer, over and over."""
    size = os.path.getsize(path)
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags)
    buffer = memoryview(mmap.mmap(-1, SLOT))

    def one(offset: int) -> None:
        place = offset % SLOT
        end = min(CHUNK, size - offset)
        done = 0
        while done < end:
            view = buffer[place + done : place + CHUNK]
            count = os.preadv(descriptor, [view], offset + done)
            if count <= 0:
                break
            done += count
            if direct and count % 4096:
                break

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(0, size, CHUNK)))
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return seconds


def ours(path: str, mode: str) -> float:
    """Seconds of pkt's stream over the same bytes, in slots of the same total size."""
    size = os.path.getsize(path)
    reader = _core.Reader([(path, size)], mode, 8)
    step = SLOT // 2
    jobs = [_core.layout([(0, at, min(at + step, size), 1)]) for at in range(0, size, step)]
    slots = [arena(step + 4096) for _ in range(2)]
    for slot in slots:
        slot.zero_()
    start = time.perf_counter()
    stream = _core.Stream(reader, [slot.numpy() for slot in slots], jobs)
    while (lease := stream.next()) is not None:
        stream.release(lease[1])
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def safetensors_loading(path: str) -> float:
    """Seconds of loading every tensor with safetensors, one after another, and dropping it."""
    from safetensors import safe_open

    start = time.perf_counter()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            file.get_tensor(name).clone()
    return time.perf_counter() - start


RUNS = {
    "raw buffered": lambda path: raw(path, direct=False),
    "raw direct": lambda path: raw(path, direct=True),
    "pkt mmap": lambda path: ours(path, "mmap"),
    "pkt buffered": lambda path: ours(path, "buffered"),
    "pkt direct": lambda path: ours(path, "direct"),
    "safetensors": safetensors_loading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="default: 4 GB of random weights, made for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=RUNS)
    parser.add_argument("--cgroup-bytes", type=int)
    args = parser.parse_args()
    if args.run:
        print(RUNS[args.run](args.file))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.file is None:
            made = make(Path(folder) / "model", "--layers", "8", "--shard-bytes", str(1 << 40))
            args.file = str(next(made.glob("*.safetensors")))
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Every loader in turn, round after round."""
    size = os.path.getsize(args.file)
    group = None
    if args.cgroup_bytes:
        group = Path("/sys/fs/cgroup/memory/pkt-bench")
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(args.cgroup_bytes))
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name, seconds in found.items():
            drop_cache()
            command = [sys.executable, __file__, args.file, "--run", name]
            if group:
                join = f'echo $$ > {group}/cgroup.procs; exec "$@"'
                command = ["sh", "-c", join, "sh", *command]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds.append(float(done.stdout))
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    best_raw = min(middle["raw buffered"], middle["raw direct"])
    limit = f", in a cgroup of {args.cgroup_bytes / 2**30:.1f} GiB" if group else ""
    lines = [f"{machine()}; {size / 1e9:.2f} GB, cold{limit}; median of {args.rounds} rounds"]
    for name, median in middle.items():
        spread = f"{size / max(found[name]) / 1e9:.2f}–{size / min(found[name]) / 1e9:.2f}"
        lines.append(
            f"{name:14} {size / median / 1e9:5.2f} GB/s ({spread})   "
            f"{best_raw / median:.2f} of the best raw read"
        )
    write_record("reader", lines)


if __name__ == "__main__":
    main()
