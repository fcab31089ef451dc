"""Scoring on a device: Triton kernels and torch in row blocks, against the Rust kernel.

No GPU is needed: Triton's interpreter runs the kernels on the CPU, and its compiler makes the code
of a GPU without one. What they do on a real one is for `benches/python/bench_cuda.py`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fused_cases
from fused_cases import CASES, Case, tensors
from pkt import sensitivity
from pkt.sensitivity import device

torch.set_num_threads(1)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it comes with torch's CUDA build",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def process(code: list[str], folder: Path, **env: str) -> None:
    """A process of its own: triton asks its environment when it is imported."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, *code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the Triton kernels leave of every case."""
    folder = tmp_path_factory.mktemp("triton")
    file = folder / "found.safetensors"
    process(["-W", "ignore", fused_cases.__file__, str(file)], folder, TRITON_INTERPRET="1")
    return load_file(file)


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What the Rust kernel leaves."""
    weight, gradient, scores, sums = tensors(case)
    finite = sensitivity.accumulate(weight, gradient, scores)
    finite_columns = sensitivity.accumulate_columns(weight, gradient, sums)
    return scores, sums, [int(not finite), int(not finite_columns)]


def require_equal(case: Case, scores: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor) -> None:
    wanted, wanted_sums, wanted_bad = expected(case)
    same = scores.view(torch.int32) == wanted.view(torch.int32)  # −0 is not 0
    assert bool((same | (scores.isnan() & wanted.isnan())).all())
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-13, atol=0, equal_nan=True)
    assert bad.tolist() == wanted_bad


@needs_triton
@every_case
def test_the_triton_kernels_equal_the_rust_one(
    case: Case, interpreted: dict[str, torch.Tensor]
) -> None:
    """Scores to the bit; sums of float64 up to their order."""
    require_equal(case, *(interpreted[f"{case.name} {what}"] for what in ("scores", "sums", "bad")))


@pytest.mark.parametrize("block", [1 << 20, 64])
@every_case
def test_torch_in_row_blocks_equals_the_rust_kernel(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "ROW_ELEMENTS", block)
    weight, gradient, scores, sums = tensors(case)
    before = weight.clone(), gradient.clone()
    bad, bad_columns = torch.zeros(2, 1, dtype=torch.int32).unbind()
    device.torch_accumulate(weight.view(-1), gradient.view(-1), scores.view(-1), bad)
    device.torch_accumulate_columns(weight, gradient, sums, bad_columns)
    require_equal(case, scores, sums, torch.cat([bad, bad_columns]))
    for tensor, as_it_was in zip((weight, gradient), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), as_it_was.nan_to_num()), "inputs are not touched"


@needs_gpu
@every_case
def test_on_a_gpu_either_equals_the_rust_kernel(case: Case) -> None:
    for flat, columns in (
        (device.accumulate, device.accumulate_columns),
        (device.torch_accumulate, device.torch_accumulate_columns),
    ):
        weight, gradient, scores, sums = (tensor.cuda() for tensor in tensors(case))
        bad, bad_columns = torch.zeros(2, 1, dtype=torch.int32, device="cuda").unbind()
        flat(weight.view(-1), gradient.view(-1), scores.view(-1), bad)
        columns(weight, gradient, sums, bad_columns)
        require_equal(case, scores.cpu(), sums.cpu(), torch.cat([bad, bad_columns]))


def test_what_scores_is_told_with_its_reason() -> None:
    assert sensitivity.scorer(torch.device("cpu")) == "Rust"
    found = sensitivity.scorer(torch.device("cuda"))
    if torch.cuda.is_available() and importlib.util.find_spec("triton"):
        assert found == "Triton"
    else:
        assert found.startswith("torch: triton ")


def test_without_triton_torch_scores(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from pkt.sensitivity import scorer\n"
        "assert scorer(torch.device('cuda')) == 'torch: triton is not installed'"
    )
    process(["-c", code], tmp_path)


def test_the_cases_have_both_answers() -> None:
    answers = {tuple(expected(case)[2]) for case in CASES}
    assert answers == {(0, 0), (1, 0), (1, 1)}


def test_what_was_bad_stays_bad() -> None:
    ones, bad = torch.ones(4), torch.ones(1, dtype=torch.int32)
    device.torch_accumulate(ones, ones, ones.clone(), bad)
    device.torch_accumulate_columns(ones[None], ones[None], torch.zeros(4), bad)
    assert bad.item() == 1


def test_shapes_that_differ_are_refused_before_any_kernel() -> None:
    bad = torch.zeros(1, dtype=torch.int32)
    for w, g, s in (((4,), (4,), (5,)), ((4,), (5,), (4,)), ((2, 2), (4,), (4,))):
        with pytest.raises(ValueError, match="expected equal shapes"):
            device.accumulate(torch.ones(w), torch.ones(g), torch.ones(s), bad)
    for w, g, s in (((4, 3), (4, 3), 4), ((4, 3), (3, 3), 3)):
        with pytest.raises((ValueError, RuntimeError), match=r"equal shapes|expanded size"):
            device.accumulate_columns(torch.ones(w), torch.ones(g), torch.ones(s).double(), bad)


COMPILED = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pkt.sensitivity import kernels

pointers = {"weights": "*bf16", "gradients": "*bf16", "bad": "*i32"}
flat = {**pointers, "scores": "*fp32", "count": "i64"}
rows = {**pointers, "partial": "*fp64", "rows": "i32", "columns": "i32", "tiles": "i32"}
for kernel, types, constants in (
    (kernels._accumulate, flat, {"BLOCK": kernels.BLOCK}),
    (kernels._accumulate_columns, rows,
     {"TILE_ROWS": kernels.TILE_ROWS, "TILE_COLUMNS": kernels.TILE_COLUMNS}),
):
    names = kernel.arg_names
    types = {name: types.get(name, "constexpr") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names)
               if name not in constants and name != "tiles"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32),
                       options={"num_warps": 4, "enable_fp_fusion": False})
        code = made.asm["ptx"]
        assert made.asm["cubin"], "the assembler made nothing"
        assert not re.search(r"fma|mad[.]rn[.]f|[.]ftz", code), "product and sum round one by one"
        assert "mul.f32" in code or "mul.rn.f32" in code
        assert "ld.global.v4" in code, "16 bytes at once where tensors are aligned"
"""


@needs_triton
def test_compiled_kernels_round_product_and_sum_and_keep_subnormals(tmp_path: Path) -> None:
    """By what the compiler makes for two generations of GPUs: neither fused nor flushed to zero."""
    process(["-c", COMPILED], tmp_path)
