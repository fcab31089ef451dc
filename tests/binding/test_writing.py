"""Merging and writing through the binding: torch's arithmetic, the safetensors library's files."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt import _core

NUMPY: dict[torch.dtype, Any] = {
    torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.uint16,
    torch.bfloat16: np.uint16, torch.float8_e4m3fn: np.uint8, torch.float8_e5m2: np.uint8,
}  # fmt: skip
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def raw(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(torch.uint8).numpy().view(NUMPY[tensor.dtype])


@pytest.mark.parametrize("target", [t for t in NAMES if t.itemsize > 1], ids=str)
@pytest.mark.parametrize("source", NAMES, ids=str)
def test_a_merge_is_torchs_sum_bit_by_bit(source: torch.dtype, target: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(5000, generator=draw).to(source)
    delta = torch.randn(5000, generator=draw) * 1e-3
    wide = weights.double() if source == torch.float64 else weights.float()
    for change in (delta, None):
        found = torch.empty(5000, dtype=target)
        changed = None if change is None else change.numpy()
        merged = _core.merge(raw(weights), NAMES[source], changed, raw(found), NAMES[target])
        total = wide if change is None else wide + change
        expected = total if target == torch.float64 and source == torch.float64 else total.float()
        if change is not None and target == torch.float64:
            expected = weights.double() + change.double()  # nothing is rounded
        assert torch.equal(found, expected.to(target))
        assert merged[2] is None
        if change is not None:
            lost = found.double() - weights.double() - change.double()
            assert merged[0] == pytest.approx(float(lost.square().sum()), rel=1e-9, abs=1e-30)
            assert merged[1] == pytest.approx(float(change.double().square().sum()), rel=1e-9)


def test_the_first_result_that_is_not_finite_is_reported() -> None:
    weights, delta = np.ones(100, dtype=np.float32), np.zeros(100, dtype=np.float32)
    delta[[70, 40]] = np.inf
    target = np.empty(100, dtype=np.float32)
    assert _core.merge(weights, "F32", delta, target, "F32")[2] == 40


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"delta": np.zeros(3, dtype=np.float32)}, "a change of and room for each of 4 weights"),
        ({"target": np.zeros(5, dtype=np.float32)}, "room for 5"),
        ({"weights_dtype": "I64"}, "cannot merge weights of dtype 'I64'"),
        ({"target_dtype": "F8_E4M3"}, "cannot write weights of dtype 'F8_E4M3'"),
    ],
)
def test_what_cannot_be_is_a_value_error(change: dict[str, Any], text: str) -> None:
    call: dict[str, Any] = {
        "weights": np.ones(4, dtype=np.float32), "weights_dtype": "F32", "delta": None,
        "target": np.zeros(4, dtype=np.float32), "target_dtype": "F32", **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        _core.merge(*call.values())


def test_the_target_may_overlap_neither_weights_nor_changes() -> None:
    memory = np.ones(8, dtype=np.float32)
    for weights, delta in ((memory[:4], None), (np.ones(4, dtype=np.float32), memory[3:7])):
        with pytest.raises(ValueError, match="must not overlap"):
            _core.merge(weights, "F32", delta, memory[2:6], "F32")


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "ü b\n": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    specs = [(n, NAMES.get(tensors[n].dtype, "U8"), list(tensors[n].shape)) for n in order]
    writer = _core.Writer(tmp_path / "ours", specs)
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        writer.write(name, flat[:3])
        writer.write(name, flat[3:])
    assert not (tmp_path / "ours").exists()
    assert writer.finish() == (tmp_path / "ours").stat().st_size
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours").keys() == tensors.keys()
    with pytest.raises(RuntimeError, match="used after its end"):
        writer.write("a", np.zeros(1, dtype=np.uint8))


@pytest.mark.parametrize("end", ["close", "drop", "short"])
def test_an_unfinished_file_is_gone(tmp_path: Path, end: str) -> None:
    writer = _core.Writer(tmp_path / "f", [("a", "F32", [2])])
    writer.write("a", np.zeros(4, dtype=np.uint8))
    assert len(list(tmp_path.iterdir())) == 1
    if end == "close":
        writer.close()
    elif end == "short":
        with pytest.raises(ValueError, match="tensor 'a': expected 8 bytes, found 4"):
            writer.finish()
    del writer
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as refusal:
        _core.Writer(tmp_path / "no" / "f", [("a", "F32", [2])])
    assert refusal.value.errno == errno.ENOENT
    assert str(refusal.value.filename) == str(tmp_path / "no" / "f.part")


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'F4'"):
        _core.Writer(tmp_path / "f", [("a", "F4", [2])])
