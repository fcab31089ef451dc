"""Tensors for the scoring kernels, and a process of its own that runs the kernels on them.

Run as a script, with TRITON_INTERPRET=1 from its start, it gives every case to the very Triton
kernels, on the CPU, and writes what they leave to the file that it is given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """A matrix of weights, one of gradients, and what is done to them."""

    shape: tuple[int, int]
    weight: torch.dtype = torch.bfloat16
    gradient: torch.dtype = torch.bfloat16
    content: str = "finite"  #: "finite", "bits" (NaN among them), or what is put in one place
    offset: int = 0  #: elements between the memory's begin and the tensors': not aligned

    @property
    def name(self) -> str:
        types = [str(dtype).removeprefix("torch.") for dtype in (self.weight, self.gradient)]
        rows, columns = self.shape
        return f"{rows}x{columns}-{'-'.join(types)}-{self.content}-{self.offset}"


CASES = [
    *(Case((37, 130), w, g, content) for w in DTYPES for g in DTYPES
      for content in ("finite", "bits")),
    *(Case(shape) for shape in ((1, 1), (1, 2047), (1, 2048), (1, 2049), (0, 5), (17, 128),
                                (16, 129), (300, 3), (4099, 1))),
    *(Case((5, 513), content=content) for content in ("nan", "inf", "overflow")),
    *(Case((33, 65), dtype, dtype, offset=3) for dtype in DTYPES),
]  # fmt: skip


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, gradient, float32 scores and float64 sums: always the same ones for a case."""
    draw = torch.Generator().manual_seed(len(case.name))
    weight, gradient = (
        _tensor(case, dtype, draw) for dtype in (case.weight, case.gradient)
    )  # fmt: skip
    scores = torch.rand(case.shape, generator=draw)
    sums = torch.rand(case.shape[1], generator=draw, dtype=torch.float64)
    if case.content in ("nan", "inf"):
        weight[-1, -1] = float(case.content)
    elif case.content == "overflow":
        scores[-1, -1] = torch.finfo(torch.float32).max  # the products are finite
        weight[-1, -1], gradient[-1, -1] = 1e20, 1e18
    return weight, gradient, scores, sums


def _tensor(case: Case, dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    count = case.shape[0] * case.shape[1] + case.offset
    if case.content != "bits":
        return torch.randn(count, generator=draw).to(dtype)[case.offset :].view(case.shape)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=draw).to(INTEGERS[dtype])
    values = bits.view(dtype)
    if dtype == torch.bfloat16:  # Triton's interpreter widens subnormals of this type wrongly
        values[(values != 0) & (values.float().abs() < torch.finfo(dtype).tiny)] = 0
    return values[case.offset :].view(case.shape)


def main(target: str) -> None:
    from safetensors.torch import save_file

    from pkt.sensitivity import kernels

    found = {}
    for case in CASES:
        weight, gradient, scores, sums = tensors(case)
        bad, bad_columns = torch.zeros(2, 1, dtype=torch.int32).unbind()
        kernels.accumulate(weight.view(-1), gradient.view(-1), scores.view(-1), bad)
        kernels.accumulate_columns(weight, gradient, sums, bad_columns)
        found |= {
            f"{case.name} scores": scores, f"{case.name} sums": sums,
            f"{case.name} bad": torch.cat([bad, bad_columns]),
        }  # fmt: skip
    save_file(found, target)


if __name__ == "__main__":
    main(sys.argv[1])
