"""Merging an adapter into a student of several shards, beside PEFT's own way.

The rival is what PEFT's documentation says: load the student, `merge_and_unload()`,
`save_pretrained()` in shards of the same size. Each side is a process of its own; peak is
anonymous memory, and what the process holds before it reads a weight (libraries, adapter) is said
too. pkt's time is given with and without its comparison of every written element.
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

from pkt.adapter import adapter_config, adapter_tensors, read_factors, write_adapter
from pkt.api import execute_export, prepare_export
from pkt.host import PeakMeter, anonymous_bytes
from pkt.records import LowRank
from record import machine, make, write_record

SHAPE = ["--hidden", "2048", "--ffn", "5504", "--layers", "20", "--heads", "16", "--kv-heads", "16"]
PROBE = "model.layers.7.mlp.up_proj"


def random_adapter(folder: Path, student: Path, rank: int) -> Path:
    """A LoRA over every projection, its product about a hundredth of the weights."""
    config = json.loads((student / "config.json").read_text())
    wide, inner = config["hidden_size"], config["intermediate_size"]
    draw = torch.Generator().manual_seed(0)
    factors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            block = "self_attn" if name in "qkvo" else "mlp"
            rows = inner if name in ("gate", "up") else wide
            columns = inner if name == "down" else wide
            b = torch.randn(rows, rank, generator=draw) * 2e-4 / rank**0.5
            a = torch.randn(rank, columns, generator=draw)
            factors[f"model.layers.{layer}.{block}.{name}_proj"] = LowRank(b, a)
    folder.mkdir()
    names = adapter_config(factors, rank, str(student), every_layer=True)
    write_adapter(folder, names, adapter_tensors(factors, None))
    return folder


def with_pkt(student: Path, adapter: Path, out: Path, dtype: str) -> dict[str, Any]:
    task = prepare_export(adapter, "merged", student=str(student), dtype=dtype, max_ram="1GiB")
    held = anonymous_bytes()
    run = execute_export(task, out).run
    seconds = run["seconds"]
    return {"held": held, "peak": run["peak_anonymous_bytes"], "write": seconds["write"]}


def with_peft(student: Path, adapter: Path, out: Path, shard_bytes: int) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    held, meter = anonymous_bytes(), PeakMeter()
    start = time.perf_counter()
    with meter.running():
        model = AutoModelForCausalLM.from_pretrained(student)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size=shard_bytes)
    return {"held": held, "peak": meter.peak_bytes, "write": time.perf_counter() - start}


def rounding(student: Path, adapter: Path, out: Path) -> float:
    """‖W' − W − Δ‖ / ‖Δ‖ of one module, in float64 from the files."""
    from safetensors import safe_open

    half = read_factors(adapter)[PROBE]
    delta = half.b.double() @ half.a.double()

    def weight(folder: Path) -> torch.Tensor:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        path = folder / index["weight_map"][f"{PROBE}.weight"]
        with safe_open(path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(f"{PROBE}.weight")
        return found.double()

    return float((weight(out) - weight(student) - delta).norm() / delta.norm())


def run_side(name: str, folder: Path, shard_bytes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
    command += ["--shard-bytes", str(shard_bytes)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default=None, help="folder with 10 GB of room")
    parser.add_argument("--shard-bytes", type=int, default=600_000_000)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--side", choices=["pkt", "pkt-float32", "peft"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        student, adapter = args.folder / "student", args.folder / "adapter"
        out = args.folder / args.side
        if args.side == "peft":
            found = with_peft(student, adapter, out, args.shard_bytes)
        else:
            dtype = "float32" if args.side == "pkt-float32" else "auto"
            found = with_pkt(student, adapter, out, dtype)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        student = make(folder / "student", *SHAPE, "--shard-bytes", str(args.shard_bytes))
        adapter = random_adapter(folder / "adapter", student, args.rank)
        shards = sorted(path.stat().st_size for path in student.glob("*.safetensors"))
        lines = [
            f"{machine()}; bfloat16 student of {sum(shards) / 1e9:.2f} GB in {len(shards)} shards, "
            f"the largest {shards[-1] / 2**20:.0f} MiB; LoRA of rank {args.rank} on "
            f"{len(read_factors(adapter))} modules"
        ]
        for side in ("pkt", "peft", "pkt-float32"):
            start = time.perf_counter()
            found = run_side(side, folder, args.shard_bytes)
            whole = time.perf_counter() - start
            out = folder / side
            written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            lines.append(
                f"{side:12} {written:11d} bytes   merged in {found['write']:6.1f} s, whole process "
                f"{whole:6.1f} s   peak {found['peak'] / 2**20:6.0f} MiB, "
                f"{(found['peak'] - found['held']) / 2**20:6.0f} above libraries and adapter   "
                f"rounding of Δ {rounding(student, adapter, out):.3g}"
            )
    write_record("export", lines)


if __name__ == "__main__":
    main()
