"""The forecast of `pkt bench extract` beside what the extraction then took, phase by phase.

Both in processes of their own, cold (needs root to drop the page cache). The share of the limit is
that of `pkt.bench.forecast.limit_seconds`, by the rates measured just before the run; the disk's is
what plain parallel reads of half a minute sustain, since a disk that is held to a rate lets bursts
through.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from pkt.bench.forecast import Work, limit_seconds
from pkt.config import READ_THREADS
from pkt.disk import STRETCH_BYTES, drop_cached, pages, raw_reading, stretches
from record import long_seeds, machine, make, write_record

STEADY_SECONDS = 30.0


def pkt(*arguments: str) -> Any:
    """The JSON object that a command prints, begun with an empty page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    command = [sys.executable, "-m", "pkt", *arguments, "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def steady_raw(folder: Path) -> float:
    """Bytes a second of plain parallel reads of the checkpoint, cold; 0: too small to tell."""
    files = [(path, path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))]
    places = stretches(files, STRETCH_BYTES, 1 << 20)
    for place in places:
        drop_cached(files, place)
    memory, best = pages(STRETCH_BYTES), 0.0
    if len(places) < 2:
        return best
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for direct in (False, True):
            take = raw_reading(files, direct, memory, pool)
            half = places[direct::2]  # each stretch in one of the two ways: none is cached
            begun, read = time.perf_counter(), 0
            for place in half:
                read += take(place)
                if (seconds := time.perf_counter() - begun) > STEADY_SECONDS / 2:
                    break
            best = max(best, read / seconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", help="default: 8 layers, 4096 wide, random bf16 (3.8 GB)")
    parser.add_argument("--student", help="default: 4 layers, 1024 wide")
    parser.add_argument("--seeds", help="default: long texts of built-in stories")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--max-ram", default="auto")
    parser.add_argument("--label", help="what is run and where, for the record")
    parser.add_argument("--work", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        small = ["--layers", "4", "--hidden", "1024", "--ffn", "2752", "--heads", "8"]
        teacher = args.teacher or make(folder / "teacher", "--layers", "8")
        student = args.student or make(folder / "student", *small, "--kv-heads", "8")
        seeds = args.seeds or long_seeds(folder / "seeds.jsonl", args.limit)
        given = [
            f"--teacher={teacher}", f"--student={student}", f"--seeds={seeds}",
            f"--limit={args.limit}", f"--max-tokens={args.tokens}", f"--max-ram={args.max_ram}",
        ]  # fmt: skip
        forecast = pkt("bench", "extract", *given, f"--folder={folder}")
        raw = steady_raw(Path(teacher)) or 1e9 * max(
            rate["gigabytes_per_second"]
            for name, rate in forecast["rates"].items()
            if name.startswith("raw")
        )
        run = pkt("extract", *given, "-o", str(folder / "out"), f"--io={forecast['io']['mode']}")
    took: dict[str, float] = run["run"]["seconds"]
    whole = sum(took.values())
    theirs = {
        "embedding and head": took.get("embed", 0.0) + took.get("head", 0.0),
        **{name: took.get(name, 0.0) for name in ("forward", "backward", "ends", "factors")},
    }
    work = forecast["work"]
    limit = limit_seconds(
        Work(**{field.name: work[field.name] for field in fields(Work)}),
        raw, forecast["teraflops"] * 1e12, forecast["copy_gigabytes_per_second"] * 1e9,
    )  # fmt: skip
    lines = [
        *([args.label] if args.label else []),
        f"{args.limit} seeds × {args.tokens} tokens ({work['tokens']} in all), {machine()}",
        f"forecast {forecast['seconds']:.1f} s, bound by {forecast['bound']}; took {whole:.1f} s: "
        f"{forecast['seconds'] / whole:.2f} of it; {limit / whole:.2f} of the "
        "limit reached",
        *(
            f"  {phase['name']:20} forecast {phase['seconds']:8.1f} s   "
            f"took {theirs[phase['name']]:8.1f} s"
            for phase in forecast["phases"]
        ),
        f"  io {run['run']['io']}, {run['run']['gigabytes_per_second']} GB/s, stalled "
        f"{run['run']['stall_seconds']} s, {run['run']['bytes_read'] / 1e9:.1f} GB read",
        f"  peak {run['run']['peak_anonymous_bytes'] / 2**20:.0f} MiB anonymous, planned "
        f"{run['run']['planned_bytes'] / 2**20:.0f}; {forecast['teraflops']:.3f} TFLOP/s, copy "
        f"{forecast['copy_gigabytes_per_second']:.1f} GB/s, raw disk "
        f"{raw / 1e9:.2f} GB/s",
    ]
    write_record("forecast", lines)


if __name__ == "__main__":
    main()
