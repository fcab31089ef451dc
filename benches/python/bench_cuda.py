"""On a GPU: scoring beside a copy on the device, and an extraction with what it waited for.

The kernels are first held against the Rust one, bit by bit. Bytes counted are those that move, as
in `bench_kernels.py`. An extraction's stall share is the part of its two passes in which no layer
was there to compute with; its share of the matmul ceiling is its arithmetic over what a product of
square bfloat16 matrices reaches in the same process. Nothing is measured where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pkt import sensitivity
from pkt.api import execute, prepare
from pkt.config import format_bytes
from pkt.sensitivity import LayerScores, device
from record import long_seeds, machine, make, write_record

INNER = 10  # calls between two events: what starting one costs is hidden by the one before
SHAPE = (8192, 28672)  # a matrix of Llama-2-70B's MLP
SQUARE = 8192
PASSES = ("forward", "again", "backward")


def best(work: Callable[[], object], repeat: int = 7) -> float:
    """Seconds of one call on the device."""
    work()
    seconds: list[float] = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(INNER):
            work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / INNER)
    return min(seconds)


def require_same_bits() -> None:
    """End here if the device adds anything else to scores than the Rust kernel does."""
    draw = torch.Generator().manual_seed(0)
    for dtype, integers in (
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
        (torch.float32, torch.int32),
    ):
        for count in (1, 2049, 1 << 20):
            bits = torch.randint(-(1 << 31), 1 << 31, (2, count), generator=draw).to(integers)
            weight, gradient = bits.view(dtype)
            scores, there = torch.rand(count, generator=draw), torch.empty(count, device="cuda")
            there.copy_(scores)
            finite = sensitivity.accumulate(weight, gradient, scores)
            found = sensitivity.accumulate(weight.cuda(), gradient.cuda(), there)
            here = there.cpu()
            same = (here.view(torch.int32) == scores.view(torch.int32)) | (
                here.isnan() & scores.isnan()
            )
            if not bool(same.all()) or bool(found) != bool(finite):
                sys.exit(f"{dtype}, {count} elements: the device and the Rust kernel differ")


def scoring() -> list[str]:
    draw = torch.Generator("cuda").manual_seed(0)
    weight, gradient = (
        torch.randn(SHAPE, generator=draw, device="cuda").bfloat16() for _ in range(2)
    )
    scores, count = torch.zeros(SHAPE, device="cuda"), weight.numel()
    sums = torch.zeros(SHAPE[1], dtype=torch.float64, device="cuda")
    bad = torch.zeros(1, dtype=torch.int32, device="cuda")
    source = torch.ones(3 * count // 2, device="cuda")
    target = torch.zeros_like(source)
    moved = 12 * count
    copy = moved / best(lambda: target.copy_(source))
    flat = weight.view(-1), gradient.view(-1), scores.view(-1)
    lines = [
        f"copy on the device {copy / 1e9:.0f} GB/s; scorer: {sensitivity.scorer(weight.device)}"
    ]

    def line(what: str, seconds: float, size: int) -> str:
        rate = size / seconds
        return (
            f"  {what} {seconds * 1e3:.3f} ms = {rate / 1e9:.0f} GB/s: {rate / copy:.2f} of a copy"
        )

    lines += [
        line("fused", best(lambda: device.accumulate(weight, gradient, scores, bad)), moved),
        line("torch in row blocks", best(lambda: device.torch_accumulate(*flat, bad)), moved),
        line(
            "column sums",
            best(lambda: device.accumulate_columns(weight, gradient, sums, bad)),
            4 * count,
        ),
    ]
    observer = LayerScores(scores.view(-1), lambda *_: None, lambda *_: {})
    for tokens in (128, 2048):
        x, dy = (
            torch.randn(tokens, side, generator=draw, device="cuda").bfloat16()
            for side in (SHAPE[1], SHAPE[0])
        )

        def blocks(x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            observer.linear("matrix", weight, [x], [dy])

        seconds = best(blocks)
        lines.append(
            f"  dYᵀX in row blocks and scored, {tokens} tokens: {seconds * 1e3:.3f} ms, "
            f"{count / seconds / 1e9:.0f} G weights/s, {2 * tokens * count / seconds / 1e12:.0f} "
            "TFLOP/s"
        )
    return lines


def ceiling() -> float:
    """FLOP/s of a product of square bfloat16 matrices."""
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SQUARE**3 / best(lambda: torch.mm(a, b, out=out))


def extraction(args: argparse.Namespace, folder: Path, rate: float) -> list[str]:
    teacher = args.teacher or make(
        folder / "teacher", "--layers", "12", "--hidden", "4096", "--ffn", "11008",
        "--heads", "32", "--kv-heads", "32", "--vocab", "32000",
    )  # fmt: skip
    student = args.student or make(
        folder / "student", "--layers", "6", "--hidden", "2048", "--ffn", "5504",
        "--heads", "16", "--kv-heads", "16", "--vocab", "32000",
    )  # fmt: skip
    seeds = long_seeds(folder / "seeds.jsonl", args.limit)
    made: dict[str, Any] = {}
    lines = []
    for place in ("cuda", "cpu") if args.beside_cpu else ("cuda",):
        task = prepare(
            str(teacher), str(student), seeds, limit=args.limit, max_tokens=args.tokens,
            max_ram=args.max_ram, output_dir=folder / place,
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        made[place] = execute(task, folder / place, device=place)
        if place == "cpu":
            continue
        run = made[place].run
        passes = sum(run["seconds"].get(name, 0.0) for name in PASSES)
        size = task.teacher.checkpoint.bytes
        lines += [
            f"extraction: teacher {format_bytes(size)}, of the device's memory "
            f"{size / torch.cuda.get_device_properties(0).total_memory:.2f}; "
            f"{args.limit} seeds, {task.seeds.tokens} tokens in all",
            f"  {run['seconds']}",
            f"  read {run['bytes_read'] / 1e9:.1f} GB at {run['gigabytes_per_second']} GB/s "
            f"({run['io']}, {run['slots']} slots); stalled {run['stall_seconds']} s = "
            f"{run['stall_seconds'] / passes:.2f} of both passes",
            f"  {task.plan.flop / passes / 1e12:.1f} TFLOP/s of {rate / 1e12:.0f}: "
            f"{task.plan.flop / passes / rate:.2f} of the matmul ceiling",
            f"  device {format_bytes(torch.cuda.max_memory_allocated())} at its peak, "
            f"{format_bytes(torch.cuda.max_memory_reserved())} with what torch keeps; "
            f"{format_bytes(task.plan.device_bytes)} planned; host "
            f"{format_bytes(run['peak_anonymous_bytes'])}, "
            f"{format_bytes(run['planned_bytes'])} planned",
        ]
    if args.beside_cpu:
        there, here = (made[place].manifest for place in ("cuda", "cpu"))
        pairs = zip(there["layer_scores"], here["layer_scores"], strict=True)
        off = max(abs(a / b - 1) for a, b in pairs)
        lines.append(
            f"  beside the CPU: layer scores off by at most {off:.1e}, "
            f"{'the same' if there['layers'] == here['layers'] else 'OTHER'} layers kept"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="folder; by default one of 5 GB is made")
    parser.add_argument("--student", type=Path, help="folder; by default one is made")
    parser.add_argument("--limit", type=int, default=8, help="seeds")
    parser.add_argument("--tokens", type=int, default=512, help="of a seed, at most")
    parser.add_argument("--max-ram", help="as of pkt extract")
    parser.add_argument("--beside-cpu", action="store_true", help="compare with a run on the CPU")
    parser.add_argument("--no-extraction", action="store_true", help="kernels only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: no CUDA device here, nothing was measured", file=sys.stderr)
        return
    require_same_bits()
    rate = ceiling()
    lines = [
        f"{torch.cuda.get_device_name()}, {machine()}, torch {torch.__version__}",
        f"bfloat16 {SQUARE}² products: {rate / 1e12:.0f} TFLOP/s",
        *scoring(),
    ]
    torch.cuda.empty_cache()
    if not args.no_extraction:
        with tempfile.TemporaryDirectory() as folder:
            lines += extraction(args, Path(folder), rate)
    write_record("cuda", lines)


if __name__ == "__main__":
    main()
