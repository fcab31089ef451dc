"""`kill -9` at random moments, the same command again, until it is done: are the bytes the same?

A run that nothing disturbs tells how long one lasts and what it writes. Then processes of the same
command are killed, each after a random part of that time, until `--kills` have been. With
`--teacher` the models are yours, and a few kills of a long run tell what is lost by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import long_seeds, machine, make, write_record

SMALL = ("--hidden", "512", "--ffn", "1408", "--heads", "8", "--kv-heads", "8")


def contents(out: Path) -> dict[str, str]:
    """Hashes of what a finished run leaves, but for its record of time and memory."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "pkt_run.json" and "report" not in path.parts
    }


def busy(out: Path) -> float:
    """Seconds of work, of all processes that took part in a finished run."""
    record = json.loads((out / "pkt_run.json").read_text(encoding="utf-8"))
    return float(sum(record["seconds"].values()))


def start(words: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pkt", "extract", "-q", "-o", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said.decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30, help="no kills after these")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--max-ram", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default=None)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        teacher = args.teacher or make(folder / "teacher", "--layers", "12", *SMALL)
        narrow = ("--hidden", "256", "--ffn", "688", "--heads", "8", "--kv-heads", "8")
        student = args.student or make(folder / "student", "--layers", "6", *narrow)
        seeds = long_seeds(folder / "seeds.jsonl", args.limit)
        words = [
            f"--teacher={teacher}", f"--student={student}", f"--seeds={seeds}",
            f"--limit={args.limit}", f"--max-tokens={args.tokens}", f"--max-ram={args.max_ram}",
            "--io=buffered",
        ]  # fmt: skip
        begun = time.perf_counter()
        finish(start(words, folder / "whole"))
        whole = time.perf_counter() - begun
        wanted, alone = contents(folder / "whole"), busy(folder / "whole")
        kills = runs = 0
        alive: list[float] = []  # seconds of every process of a run, killed or not
        deadline = time.monotonic() + 60 * args.minutes

        def more() -> bool:
            return bool(kills < args.kills and time.monotonic() < deadline)

        while more():
            out, spent = folder / f"killed-{runs}", 0.0
            while True:
                process = start(words, out)
                begun = time.perf_counter()
                if more():
                    try:
                        process.wait(draw.uniform(whole - alone, whole))
                    except subprocess.TimeoutExpired:
                        os.kill(process.pid, signal.SIGKILL)
                        kills += 1
                finish_code = process.wait()
                spent += time.perf_counter() - begun
                if finish_code == 0:
                    break
                if finish_code != -signal.SIGKILL:
                    finish(process)
            if contents(out) != wanted:
                raise SystemExit(f"after {kills} kills: another result than undisturbed")
            alive.append(spent)
            runs += 1
    write_record(
        "kill",
        [
            f"{machine()}; {args.teacher or '12 layers, 512 wide'}, {args.limit} seeds × "
            f"{args.tokens} tokens",
            f"undisturbed {whole:.1f} s ({alone:.1f} s of work); {kills} kills -9 in {runs} runs "
            "at random moments of the work: every result is the undisturbed one's, byte for byte",
            f"a run with its kills took {statistics.mean(alive):.1f} s in the mean, "
            f"{(statistics.mean(alive) - whole) * runs / kills:.1f} s more a kill, the start of a "
            f"process ({whole - alone:.1f} s) among them",
        ],
    )


if __name__ == "__main__":
    main()
