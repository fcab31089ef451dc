"""The maps of two large heads: seconds and peak memory by part, and the error against float64.

Heads are bfloat16 files of random rows; each pair of sizes runs in a process of its own, so that
the peak of anonymous memory is its own. Where the vocabularies differ in size the shared tokens are
spread over the larger one. Two errors: the normal equations of `dual` at full size, for a few
random states, and both maps of a sub-sample (some rows, some channels) against dense
pseudo-inverses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pkt.host import PeakMeter, anonymous_bytes
from pkt.models import open_model
from pkt.semantics import MAPS, Bases, Evidence, HeadPair, Rows, no_norm
from pkt.stream import TORCH_DTYPES, CheckpointSource
from record import machine, write_record

PAIRS = ("131072x8192:131072x4096", "131072x8192:32768x4096", "32768x5120:32768x4096")
SAMPLE = (4096, 256)  # rows and channels that a pseudo-inverse is made of
STATES = 16


def write_head(folder: Path, rows: int, width: int, seed: int) -> None:
    """A model folder that is little more than its head, tied to the embedding."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    head = torch.empty(rows, width, dtype=torch.bfloat16)
    mix = torch.randn(width, generator=draw).exp()  # channels of unlike size: not too well made
    for start in range(0, rows, 4096):
        part = head[start : start + 4096]
        part.copy_(torch.randn(part.shape, generator=draw) * mix)
    layer = torch.zeros(1, 1, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": head, "model.layers.0.mlp.up_proj.weight": layer}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))


def rows_of(folder: Path) -> Rows:
    model = open_model(str(folder), {})
    piece = model.embedding
    kind, place = TORCH_DTYPES[piece.dtype], torch.device("cpu")
    source = CheckpointSource(model.checkpoint, "buffered", 1, kind, place)
    return Rows(piece, "model.safetensors", source.read, no_norm(piece.shape[1]))


def side(args: argparse.Namespace) -> None:
    """One pair in this process; prints one JSON line."""
    pair = HeadPair(
        rows_of(args.folder / "teacher"), rows_of(args.folder / "student"), torch.empty(0, 2)
    )
    sizes = [each.piece.shape[0] for each in (pair.teacher, pair.student)]
    shared = min(sizes)
    spread = [torch.arange(shared) * size // shared for size in sizes]
    pair = replace(pair, ids=torch.stack(spread, 1))
    seconds: dict[str, float] = {}
    bases, start, peak = Bases(pair), anonymous_bytes(), PeakMeter()
    with peak.running():

        def timed(name: str, make: Any) -> Any:
            begun = time.perf_counter()
            made = make()
            seconds[name] = round(time.perf_counter() - begun, 2)
            return made

        timed("hashes", lambda: (pair.teacher.sha256(), pair.student.sha256()))
        timed("Gram matrices", lambda: bases.grams)
        timed("eigenvalues, Cholesky", lambda: (bases.teacher, bases.student))
        dual = timed("dual", lambda: MAPS["dual"].make(Evidence((0, 0), bases)))
        timed("cosine", lambda: MAPS["cosine"].make(Evidence((0, 0), bases)))
    found = {
        "seconds": seconds,
        "peak_bytes": peak.peak_bytes - start,
        "condition": [bases.teacher.condition, bases.student.condition],
        "self_cosine": [bases.recomposed.teacher_self, bases.recomposed.student_self],
        "normal_equations": residual(pair, dual),
        "sub_sample": sub_sample(pair),
    }
    print(json.dumps(found))


def residual(pair: HeadPair, dual: torch.Tensor) -> float:
    """‖W_Sᵀ (W_S M h − W_T h)‖ / ‖W_Sᵀ W_T h‖, the largest of some random states."""
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(pair.teacher.width, STATES, generator=draw, dtype=torch.float64)
    mapped = dual @ states
    left, whole = torch.zeros_like(mapped), torch.zeros_like(mapped)
    for _, teacher, student in pair.chunks():
        wanted = teacher @ states
        left += student.T @ (student @ mapped - wanted)
        whole += student.T @ wanted
    return float((left.norm(dim=0) / whole.norm(dim=0)).max())


def sub_sample(pair: HeadPair) -> dict[str, float]:
    """‖M − M*‖ / ‖M*‖ of both maps over some rows and channels, M* by pseudo-inverses."""
    step = max(1, len(pair.ids) // SAMPLE[0])
    ids = pair.ids[::step]
    heads = [
        rows.take(ids[:, at])[:, : SAMPLE[1]] for at, rows in ((0, pair.teacher), (1, pair.student))
    ]

    def held(head: torch.Tensor) -> Rows:
        width = head.shape[1] * 8

        def read(pieces: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {n: head[p.begin // width : p.end // width] for n, p in pieces.items()}

        piece = replace(
            pair.teacher.piece, dtype="F64", shape=tuple(head.shape), begin=0, end=head.nbytes
        )
        return Rows(piece, "sub-sample", read, no_norm(head.shape[1]))

    both = torch.arange(len(ids))[:, None].expand(-1, 2)
    bases = Bases(HeadPair(held(heads[0]), held(heads[1]), both))
    s_t, s_s = (torch.linalg.pinv(head) for head in heads)
    dense = {"dual": s_s @ heads[0], "cosine": (s_s / s_s.norm(dim=0)) @ (s_t / s_t.norm(dim=0)).T}
    return {
        name: float((MAPS[name].make(Evidence((0, 0), bases)) - exact).norm() / exact.norm())
        for name, exact in dense.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="VxD:VxD")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        side(args)
        return
    lines = [f"{machine()}, {torch.get_num_threads()} threads"]
    for sizes in args.pairs:
        with tempfile.TemporaryDirectory() as name:
            for seed, (role, size) in enumerate(
                zip(("teacher", "student"), sizes.split(":"), strict=True)
            ):
                rows, width = map(int, size.split("x"))
                write_head(Path(name) / role, rows, width, seed)
            command = [sys.executable, __file__, "--folder", name]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(ran.stdout)
        parts = ", ".join(f"{part} {value}" for part, value in found["seconds"].items())
        errors = ", ".join(f"{name} {value:.1e}" for name, value in found["sub_sample"].items())
        lines += [
            f"{sizes}: {sum(found['seconds'].values()):.1f} s ({parts})",
            f"  peak {found['peak_bytes'] / (1 << 20):.0f} MiB above what imports hold; "
            f"condition {found['condition'][0]:.3g}, {found['condition'][1]:.3g}; "
            f"self-cosine {found['self_cosine'][0]:.3f}, {found['self_cosine'][1]:.3f}",
            f"  normal equations of dual {found['normal_equations']:.1e}; "
            f"sub-sample against pseudo-inverses: {errors}",
        ]
    if args.no_record:
        print("\n".join(lines))
    else:
        write_record("semantics", lines)


if __name__ == "__main__":
    main()
