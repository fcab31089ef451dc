"""A training run with a frozen start beside the same Trainer with plain PEFT LoRA of rank r.

Both sides train the same parameters of the same student on the same batches with the same
TrainingArguments; one is wrapped by `peft.get_peft_model` alone, the other by `pkt.training`.
Sides take turns, each in a process of its own; a ratio is taken pair by pair, of the median step
without the first, and the median of the ratios stands in the record. Peak is anonymous memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pkt.host import PeakMeter
from pkt.records import LowRank, Sample
from pkt.training import Schedule, fit, inject
from record import machine, make, write_record

RANK = 16


def side(args: argparse.Namespace) -> None:
    """One side in this process; prints one JSON line."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    base = AutoModelForCausalLM.from_pretrained(args.student, dtype=dtype)
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [name for name, _ in base.named_modules() if name.endswith(leaves)]
    model: Any
    if args.side == "plain":
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, lora_dropout=args.dropout, target_modules=names,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(base, config)
    else:
        generator = torch.Generator().manual_seed(0)
        halves = {}
        for name in names:
            rows, columns = base.get_submodule(name).weight.shape
            b = torch.randn(rows, RANK, generator=generator) / RANK
            halves[name] = LowRank(b, torch.randn(RANK, columns, generator=generator) / RANK)
        model = inject(base, halves, halves, args.dropout)
    choose = random.Random(0)
    samples = [
        Sample(str(i), tuple(choose.randrange(1000) for _ in range(args.tokens)),
               (False, *[True] * (args.tokens - 1)))
        for i in range(args.batch * args.steps)
    ]  # fmt: skip
    schedule = Schedule(
        batch_size=args.batch, micro_batch=args.batch, max_steps=args.steps,
        gradient_checkpointing=args.checkpointing,
    )  # fmt: skip
    moments = [time.perf_counter()]
    meter = PeakMeter()
    with tempfile.TemporaryDirectory() as folder, meter.running():
        fit(
            model, samples, schedule, Path(folder),
            notify=lambda step, steps, metrics: moments.append(time.perf_counter()),
        )  # fmt: skip
    steps = [b - a for a, b in itertools.pairwise(moments[1:])]
    print(json.dumps({"step": statistics.median(steps), "peak": meter.peak_bytes}))


def run(kind: str, args: argparse.Namespace, student: Path, dtype: str) -> dict[str, float]:
    words = [
        sys.executable, __file__, "--side", kind, "--student", str(student), "--dtype", dtype,
        "--tokens", args.tokens, "--batch", args.batch, "--steps", args.steps,
        "--dropout", args.dropout,
    ]  # fmt: skip
    words += ["--checkpointing"] if args.checkpointing else []
    done = subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--side", choices=["plain", "pkt"])
    parser.add_argument("--student")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    if args.side:
        side(args)
        return
    lines = [
        machine(),
        f"{args.layers} layers, hidden {args.hidden}, rank {RANK}, dropout {args.dropout:g}, "
        f"{args.batch} × {args.tokens} tokens a step, {args.pairs} pairs of processes"
        + (", gradient checkpointing" if args.checkpointing else ""),
    ]
    with tempfile.TemporaryDirectory() as folder:
        heads = args.hidden // 128
        ffn = args.hidden * 43 // 16
        student = make(
            Path(folder) / "student", "--layers", str(args.layers), "--hidden", str(args.hidden),
            "--ffn", str(ffn), "--heads", str(heads), "--kv-heads", str(heads), "--vocab", "8192",
        )  # fmt: skip
        for dtype in args.dtypes.split(","):
            ratios, peaks, plain = [], [], []
            for index in range(args.pairs):
                order = ("plain", "pkt") if index % 2 == 0 else ("pkt", "plain")
                found = {kind: run(kind, args, student, dtype) for kind in order}
                ratios.append(found["pkt"]["step"] / found["plain"]["step"])
                peaks.append(found["pkt"]["peak"] / found["plain"]["peak"])
                plain.append(found["plain"]["step"])
            lines.append(
                f"{dtype}: a step of plain PEFT {statistics.median(plain):.3f} s; with a start "
                f"{statistics.median(ratios):.3f} of that "
                f"({', '.join(f'{ratio:.3f}' for ratio in ratios)}); "
                f"peak memory {statistics.median(peaks):.3f} of plain"
            )
    write_record("training", lines)


if __name__ == "__main__":
    main()
