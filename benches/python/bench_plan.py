"""The planned peak beside the measured one: shapes of large teachers, two layers deep, by budget.

Depth costs no memory, so two layers (one of random weights, one a hole in the file) of each
teacher and one of its student tell what a whole one would hold. Peaks are anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from record import long_seeds, machine, make, write_record

#: teacher, student, --max-ram, seeds, tokens of each, further options of extract
CASES: Sequence[tuple[str, str, str, int, int, tuple[str, ...]]] = (
    ("llama-2-7b", "small", "2304MiB", 4, 128, ()),
    ("llama-2-13b", "llama-2-7b", "2560MiB", 4, 512, ()),
    ("llama-2-13b", "llama-2-7b", "4GiB", 2, 2048, ()),
    ("llama-2-70b", "llama-2-7b", "4GiB", 4, 128, ()),
    ("llama-2-70b", "llama-2-7b", "6GiB", 4, 512, ()),
    ("llama-2-70b", "llama-2-7b", "8GiB", 4, 128, ()),
    ("llama-2-70b", "llama-2-7b", "8GiB", 1, 2048, ()),
    ("qwen2.5-72b", "llama-2-7b", "6GiB", 4, 128, ()),
    ("mistral-large", "llama-2-7b", "8GiB", 4, 128, ()),
    ("llama-2-7b", "small", "4GiB", 2, 512, ("--dtype", "float32")),
    ("llama-2-13b", "llama-2-7b", "4GiB", 4, 128, ("--select", "consistent")),
    ("llama-3-405b", "llama-2-7b", "12GiB", 2, 128, ()),
)
SMALL = ("--hidden", "2048", "--ffn", "5504", "--heads", "16", "--kv-heads", "16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default=None, help="folder with 16 GB of room")
    parser.add_argument("--only", default="", help="teachers whose name holds this")
    args = parser.parse_args()
    lines = [machine()]
    for teacher, student, budget, seeds, tokens, more in CASES:
        if args.only not in teacher:
            continue
        with tempfile.TemporaryDirectory(dir=args.work) as name:
            work = Path(name)
            large = make(
                work / "teacher", "--shape", teacher, "--layers", "2", "--real-layers", "1",
                *(("--vocab", "32768") if teacher == "llama-3-405b" else ()),
            )  # fmt: skip
            shape = SMALL if student == "small" else ("--shape", student)
            small = make(work / "student", *shape, "--layers", "1", "--real-layers", "0")
            command = [
                sys.executable, "-m", "pkt", "extract", "-q", "-o", str(work / "out"),
                "--teacher", str(large), "--student", str(small), "--max-ram", budget,
                "--seeds", str(long_seeds(work / "seeds.jsonl", seeds)), "--limit", str(seeds),
                "--max-tokens", str(tokens), *more,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            label = f"{teacher:14} {budget:>7} {seeds} × {tokens:<5}{' '.join(more[1:]):11}"
            if done.returncode:
                lines.append(f"{label} exit {done.returncode}: {done.stderr.splitlines()[0]}")
            else:
                run = json.loads((work / "out" / "pkt_run.json").read_text("utf-8"))
                peak, planned = run["peak_anonymous_bytes"], run["planned_bytes"]
                lines.append(
                    f"{label} {run['slots']} slots, scores of a {run['scores']:6}  "
                    f"planned {planned / 2**20:6.0f} MiB   peak {peak / 2**20:6.0f} MiB   "
                    f"peak/planned {peak / planned:.3f}"
                )
            print(lines[-1], flush=True)
            shutil.rmtree(work / "teacher")
    write_record("plan", lines)


if __name__ == "__main__":
    main()
