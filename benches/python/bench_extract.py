"""Whole extraction beside the thing a user would otherwise take: autograd with all in RAM.

The rival loads the teacher with transformers, back-propagates one seed at a time and scores every
parameter in chunks of 1 M elements (plain: whole tensors at once). It makes layer scores only;
pkt's time includes windows, factors, adapter and report, and is given without them too. Each side
is a process of its own; peak is anonymous memory. Arithmetic alone is 8/6 = 1.33.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pkt.api import execute, prepare
from pkt.host import PeakMeter
from record import long_seeds, machine, make, write_record

CHUNK = 1 << 20


def autograd(teacher: str, seeds: list[tuple[list[int], list[bool]]], chunked: bool) -> list[float]:
    """Layer scores by torch alone: what pkt's sweep is measured against."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    scores = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for tokens, mask in seeds:
        ids = torch.tensor([tokens])
        labels = torch.where(torch.tensor([mask]), ids, -100)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            weight, gradient, total = (
                t.detach().view(-1) for t in (parameter, parameter.grad, scores[name])
            )
            step = CHUNK if chunked else weight.numel()
            for at in range(0, weight.numel(), step):
                part = slice(at, at + step)
                total[part] += (weight[part].float() * gradient[part].float()).abs()
            parameter.grad = None
    layers = model.config.num_hidden_layers
    return [
        sum(float(s.sum(dtype=torch.float64)) for n, s in scores.items() if f".layers.{i}." in n)
        for i in range(layers)
    ]


def side(args: argparse.Namespace) -> None:
    """One side in this process; prints one JSON line."""
    meter = PeakMeter()
    start = time.perf_counter()
    with meter.running():
        task = prepare(
            args.teacher, args.student, args.seeds, limit=args.limit, max_tokens=args.tokens,
            max_ram=args.max_ram,
        )  # fmt: skip
        start = time.perf_counter()
        if args.side == "pkt":
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                made = execute(task, Path(folder) / "out", io="buffered")
            scores, seconds = made.manifest["layer_scores"], made.run["seconds"]
        else:
            pairs = [(list(s.tokens), list(s.loss_mask)) for s in task.seeds.samples]
            scores, seconds = autograd(args.teacher, pairs, args.side == "chunked"), {}
    total = time.perf_counter() - start
    sweep = sum(seconds.get(n, 0.0) for n in ("skeleton", "embed", "forward", "head", "backward"))
    print(json.dumps({
        "seconds": total, "scores_seconds": sweep or total, "peak": meter.peak_bytes,
        "layer_scores": scores, "tokens": task.seeds.tokens, "phases": seconds,
    }))  # fmt: skip


def run_side(name: str, inputs: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], *inputs, "--side", name]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", help="default: 8 layers, 4096 wide, random bf16 (3.8 GB)")
    parser.add_argument("--student", help="default: 4 layers, 1024 wide")
    parser.add_argument("--seeds", help="default: long texts of built-in stories")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--max-ram", default=None)
    parser.add_argument("--work", default=None)
    parser.add_argument("--side", choices=["pkt", "chunked", "plain"])
    parser.add_argument("--sides", default="pkt,chunked,plain")
    args = parser.parse_args()
    if args.side:
        side(args)
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        small = ["--layers", "4", "--hidden", "1024", "--ffn", "2752", "--heads", "8"]
        teacher = args.teacher or make(folder / "teacher", "--layers", "8")
        student = args.student or make(folder / "student", *small, "--kv-heads", "8")
        seeds = args.seeds or long_seeds(folder / "seeds.jsonl", args.limit)
        inputs = [f"--teacher={teacher}", f"--student={student}", f"--seeds={seeds}"]
        for side_name in args.sides.split(","):
            found[side_name] = run_side(side_name, inputs)
    ours = found["pkt"]
    lines = []
    for name, theirs in found.items():
        worst = max(
            abs(a - b) / b
            for a, b in zip(ours["layer_scores"], theirs["layer_scores"], strict=True)
        )
        lines.append(
            f"{name:8} whole {theirs['seconds']:7.1f} s   scores {theirs['scores_seconds']:7.1f} s"
            f"   peak {theirs['peak'] / 2**30:5.2f} GiB   pkt/this: time "
            f"{ours['seconds'] / theirs['seconds']:.2f} (scores "
            f"{ours['scores_seconds'] / theirs['scores_seconds']:.2f})   memory "
            f"{ours['peak'] / theirs['peak']:.2f}   layer scores differ by {worst:.1e}"
        )
    head = f"{args.limit} seeds × {args.tokens} tokens ({ours['tokens']} in all), {machine()}"
    write_record("extract", [head, *lines, f"pkt phases: {ours['phases']}"])


if __name__ == "__main__":
    main()
