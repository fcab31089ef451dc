"""Memory does not grow with layers or seeds: law 4, at the smallest --max-ram that is admitted.

Makes an 8-layer and a 32-layer teacher of the same width (2048 wide: 3.4 GB for the larger), runs
`pkt extract` on both with the smallest setting of the 8-layer one, and on the smaller one with 4
and 64 seeds. Peaks are anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pkt import inspect
from record import long_seeds, machine, make, write_record

SHAPE = ["--hidden", "2048", "--ffn", "5504", "--heads", "16", "--kv-heads", "16"]


def extract(teacher: Path, student: Path, seeds: Path, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pkt", "extract", "-q", "-o", str(out)]
    command += ["--teacher", str(teacher), "--student", str(student), "--seeds", str(seeds)]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((out / "pkt_run.json").read_text(encoding="utf-8"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default=None, help="folder with 6 GB of room")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        small = make(work / "t8", "--layers", "8", *SHAPE)
        large = make(work / "t32", "--layers", "32", *SHAPE)
        shape = ["--hidden", "1024", "--ffn", "2752", "--heads", "8", "--kv-heads", "8"]
        student = make(work / "s4", "--layers", "4", *shape)
        seeds = long_seeds(work / "seeds.jsonl", 64)
        tokens = ["--max-tokens", str(args.tokens)]
        plan = inspect(str(small), str(student), tokens=args.tokens, seeds=4).plan
        assert plan is not None
        ram = ["--max-ram", str(plan.smallest_bytes)]
        eight = extract(small, student, seeds, work / "o1", *tokens, *ram, "--limit", "4")
        deep = extract(large, student, seeds, work / "o2", *tokens, *ram, "--limit", "4")
        many = extract(small, student, seeds, work / "o3", *tokens, *ram, "--limit", "64")
    lines = [f"{machine()}; width 2048, seeds of {args.tokens} tokens, --max-ram "
             f"{plan.smallest_bytes / 2**20:.0f} MiB, the smallest admitted"]  # fmt: skip
    for label, run in (
        ("8 layers, 4 seeds", eight),
        ("32 layers, 4 seeds", deep),
        ("8 layers, 64 seeds", many),
    ):
        peak = run["peak_anonymous_bytes"]
        grown = (peak - eight["peak_anonymous_bytes"]) / 2**30
        share = run["bytes_read"] / run["checkpoint_bytes"]
        lines.append(
            f"{label:20} peak {peak / 2**20:7.0f} MiB ({grown:+.3f} GiB)   planned "
            f"{run['planned_bytes'] / 2**20:.0f} MiB   read {share:.3f} × checkpoint "
            f"({run['bytes_read']} bytes)"
        )
    write_record("memory", lines)


if __name__ == "__main__":
    main()
