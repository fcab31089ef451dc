"""Do the 164 solutions of HumanEval pass in the sandbox, and wrong ones fail; what does one cost?

Takes HumanEval.jsonl or .jsonl.gz (openai/human-eval): the canonical solutions, the same with a
body of `return None`, and every problem with the solution of the next one under its name.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import Counter
from pathlib import Path

from pkt import sandbox
from record import machine, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="HumanEval.jsonl or HumanEval.jsonl.gz")
    parser.add_argument("--workers", type=int, default=None, help="programs at a time")
    args = parser.parse_args()
    if args.file is None:  # as from `make bench`, which knows no such file
        print("bench_sandbox: no HumanEval.jsonl is given, so nothing is measured")
        return
    data = Path(args.file).read_bytes()
    text = gzip.decompress(data) if args.file.endswith(".gz") else data
    problems = [json.loads(line) for line in text.splitlines() if line.strip()]
    followers = [*problems[1:], problems[0]]

    def program(problem: dict[str, str], head: str) -> str:
        return f"{head}\n{problem['test']}\ncheck({problem['entry_point']})\n"

    sets = {
        "canonical": [program(p, p["prompt"] + p["canonical_solution"]) for p in problems],
        "return None": [program(p, p["prompt"] + "    return None\n") for p in problems],
        "the next one's": [
            program(p, f"{q['prompt']}{q['canonical_solution']}\n{p['entry_point']} = "
                       f"{q['entry_point']}\n") for p, q in zip(problems, followers, strict=True)
        ],
    }  # fmt: skip
    lines = [f"{machine()}; {len(problems)} problems; {sandbox.isolation()}"]
    for name, programs in sets.items():
        begun = time.perf_counter()
        found = sandbox.run_all(programs, workers=args.workers)
        milliseconds = (time.perf_counter() - begun) / len(programs) * 1000
        passed = sum(outcome.passed for outcome in found)
        kinds = Counter(one.reason.split(":")[0] for one in found if not one.passed)
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        lines.append(
            f"{name:15} {passed:3} pass, {len(found) - passed:3} fail   "
            f"{milliseconds:5.0f} ms a problem   {said}".rstrip()
        )
    write_record("sandbox", lines)


if __name__ == "__main__":
    main()
