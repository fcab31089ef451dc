"""The binding: what it refuses, what it reports, and that threads change no bit of an answer."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pkt import _core
from pkt.errors import CheckpointError

KERNELS = """
import hashlib, sys
import numpy as np
from pkt import _core

draw = np.random.default_rng(0)
digest = hashlib.sha256()
def note(*values):
    for value in values:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())

shape = (700, 523)
weights = draw.standard_normal(shape).astype(np.float32)
scores = np.zeros(shape[0] * shape[1], dtype=np.float32)
sums = np.zeros(shape[1])
for _ in range(3):
    gradients = draw.standard_normal(shape).astype(np.float32)
    _core.accumulate(weights.reshape(-1), "F32", gradients.reshape(-1), "F32", scores)
    _core.accumulate_columns(
        weights.reshape(-1), "F32", gradients.reshape(-1), "F32", shape[1], sums
    )
halves = (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1)
_core.accumulate(halves, "BF16", halves, "BF16", scores)
note(scores, sums, _core.score_sum(scores))
rows = draw.integers(0, shape[0], 1100).astype(np.uint32)
for matrix in (_core.Matrix(scores, shape[1]), _core.Matrix(scores, shape[1], rows, 3)):
    note(matrix.best_window(311, 200), matrix.best_window(1, 1), matrix.best_window(700, 523))
    note(matrix.top_rows(300), matrix.top_columns(100), matrix.top_weights(12345))
    note(matrix.mask_score(matrix.top_weights(999)), matrix.bin_means(64, 64))
    note(matrix.sums())
    note(matrix.cross_score(matrix.top_rows(30), matrix.top_columns(20)))
    note(matrix.window_score((3, 650), (1, 500)))
scores[rows] = 1.0  # many ties
note(_core.Matrix(scores, shape[1]).top_weights(5000), _core.best_columns(sums, 200))
note(_core.random_weights(1 << 20, 12345, 7), _core.random_window(shape, (300, 200), 7))
packed = [_core.Packed(halves, "BF16", *shape), _core.Packed(weights.reshape(-1), "F32", *shape)]
for each in packed:
    there, back = np.empty(20 * shape[1], np.float32), np.empty(20 * shape[0], np.float32)
    each.multiply(weights.reshape(-1)[: 20 * shape[0]], there, False)
    each.multiply(there, back, True)
    note(there, back)
print(digest.hexdigest())
"""


def test_thread_counts_give_the_same_bytes() -> None:
    found = set()
    for threads in (1, 2, 3, 5):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        run = subprocess.run(
            [sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        found.add(run.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_importing_the_core_loads_no_torch() -> None:
    code = "import sys, pkt, pkt._core; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] == "False"


def f32(*values: float) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 40_000, 70_001, 99_999])
def test_the_first_index_that_is_not_finite_is_reported(where: int, bad: float) -> None:
    size = 100_000  # several blocks, several threads
    weights, gradients = np.ones(size, dtype=np.float32), np.ones(size, dtype=np.float32)
    (weights if where % 2 else gradients)[where] = bad
    gradients[min(where + 7, size - 1) :: 50] = bad  # later ones do not matter
    scores, sums = np.zeros(size, dtype=np.float32), np.zeros(10)
    assert _core.accumulate(weights, "F32", gradients, "F32", scores) == where
    assert _core.accumulate_columns(weights, "F32", gradients, "F32", 10, sums) == where
    assert scores[:where].tolist() == [1.0] * where


def test_a_product_or_a_sum_that_overflows_is_not_finite() -> None:
    large = f32(1.0, 3e38)
    assert _core.accumulate(large, "F32", f32(1.0, 2.0), "F32", f32(0.0, 0.0)) == 1
    assert _core.accumulate(large, "F32", f32(1.0, 1.0), "F32", f32(0.0, 3e38)) == 1
    assert _core.accumulate(large, "F32", f32(1.0, 1.0), "F32", f32(0.0, 0.0)) is None


def test_score_sum_in_float64() -> None:
    assert _core.score_sum(f32()) == 0.0
    values = f32(2.0**24, *[1.0] * 1000)  # float32 would lose every one of them
    assert _core.score_sum(values) == 2.0**24 + 1000
    draw = np.random.default_rng(0).random(300_000, dtype=np.float32)
    assert _core.score_sum(draw) == pytest.approx(float(draw.sum(dtype=np.float64)), rel=1e-13)


def test_masks_count_bits_from_the_least_significant() -> None:
    scores = f32(0, 5, 1, 9, 0, 0, 0, 0, 0, 7, 0, 0)
    matrix = _core.Matrix(scores, 4)
    assert matrix.top_weights(3) == bytes([0b1010, 0b10])
    assert matrix.mask_score(bytes([0b1010, 0b10])) == 21.0
    assert matrix.top_weights(5) == bytes([0b1111, 0b10]), "zeros tie: the lowest index first"
    assert matrix.top_weights(0) == bytes(2)
    assert matrix.shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.best_window(4, 1), "4×1 does not fit into a matrix of 3×4"),
        (lambda m: m.best_window(1, 5), "1×5 does not fit into a matrix of 3×4"),
        (lambda m: m.best_window(0, 1), ""),
        (lambda m: m.window_score((0, 4), (0, 1)), ""),
        (lambda m: m.window_score((2, 1), (0, 1)), ""),
        (lambda m: m.top_rows(4), "cannot select 4 of 3 rows"),
        (lambda m: m.top_columns(5), "cannot select 5 of 4 columns"),
        (lambda m: m.top_weights(13), "cannot select 13 of 12"),
        (lambda m: m.cross_score([3], [0]), ""),
        (lambda m: m.cross_score([0], [4]), ""),
        (lambda m: m.mask_score(bytes(1)), ""),
        (lambda m: m.mask_score(bytes([0, 0b10000])), ""),
        (lambda m: m.bin_means(0, 1), ""),
        (lambda m: m.bin_means(4, 1), ""),
    ],
)
def test_what_cannot_be_is_a_value_error(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text or r"\w+ \w+"):
        call(_core.Matrix(np.ones(12, dtype=np.float32), 4))


@pytest.mark.parametrize(
    ("scores", "columns", "rows", "share"),
    [
        (f32(1, 2, 3), 2, None, 1),
        (f32(1, 2), 0, None, 1),
        (f32(1, 2), 2, [1], 1),
        (f32(1, 2), 2, None, 0),
        (f32(1, -2), 2, None, 1),
        (f32(1, np.nan), 2, None, 1),
        (f32(1, np.inf), 2, None, 1),
    ],
)
def test_what_is_no_score_matrix_is_a_value_error(
    scores: Any, columns: int, rows: Any, share: int
) -> None:
    held = None if rows is None else np.asarray(rows, dtype=np.uint32)
    with pytest.raises(ValueError, match="score"):
        _core.Matrix(scores, columns, held, share).best_window(1, 1)


def test_arrays_of_another_type_or_layout_are_refused() -> None:
    good = np.ones(6, dtype=np.float32)
    for wrong in (
        np.ones(6),
        np.ones(12, dtype=np.float32)[::2],
        np.ones(6, dtype=np.uint16),
        [1.0],
    ):
        with pytest.raises((TypeError, ValueError, BufferError)):
            _core.accumulate(wrong, "F32", good, "F32", np.zeros(6, dtype=np.float32))  # type: ignore[arg-type]
    frozen = np.zeros(6, dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises((TypeError, ValueError, BufferError)):
        _core.accumulate(good, "F32", good, "F32", frozen)
    with pytest.raises(ValueError, match="dtype 'I32'"):
        _core.accumulate(good, "I32", good, "F32", np.zeros(6, dtype=np.float32))
    with pytest.raises(ValueError, match="expected a score for each of 6 weights, found 5"):
        _core.accumulate(good, "F32", good, "F32", np.zeros(5, dtype=np.float32))
    with pytest.raises(ValueError, match="expected a gradient for each of 6 weights, found 3"):
        _core.accumulate(good, "F32", good[:3].copy(), "F32", np.zeros(6, dtype=np.float32))


def test_products_that_do_not_fit_are_refused() -> None:
    good, out = np.ones(6, dtype=np.float32), np.zeros(6, dtype=np.float32)
    with pytest.raises(ValueError, match="found 6 elements"):
        _core.Packed(good, "F32", 2, 4)
    with pytest.raises(ValueError, match="found float16"):
        _core.Packed(good.astype(np.float16).view(np.uint16), "F16", 2, 3)
    packed = _core.Packed(good, "F32", 2, 3)
    good[:] = 7.0  # what was laid out is its own
    packed.multiply(np.ones(4, dtype=np.float32), out, False)
    assert out.tolist() == [2.0] * 6
    with pytest.raises(ValueError, match=r"\(b, 3\) rows and \(b, 2\) products, found 6 and 6"):
        packed.multiply(good, out, True)
    with pytest.raises(ValueError, match="overlap"):
        packed.multiply(out[:2], out[:3], False)


def test_the_matrix_keeps_its_scores_alive() -> None:
    matrix = _core.Matrix(np.arange(1_000_000, dtype=np.float32), 1000)
    rubbish = [np.full(1_000_000, 9.0, dtype=np.float32) for _ in range(3)]
    assert matrix.best_window(1, 1)[:2] == (999, 999)
    assert len(rubbish) == 3


def write(path: Path, size: int) -> bytes:
    data = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("mode", ["mmap", "buffered", "direct"])
def test_layouts_and_rows_equal_the_file(mode: str, tmp_path: Path) -> None:
    data = [write(tmp_path / f"{i}", 300_001 + i) for i in range(2)]
    files = [(str(tmp_path / f"{i}"), len(held)) for i, held in enumerate(data)]
    reader = _core.Reader(files, mode, 3)
    extents = [(0, 8, 1000, 8), (1, 4, 290_004, 4), (0, 1000, 299_998, 2), (1, 299_000, 299_000, 4)]
    layout = _core.layout(extents)
    memory = np.zeros(layout.bytes + 4096, dtype=np.uint8)
    memory = memory[-memory.ctypes.data % 4096 :][: layout.bytes]
    reader.read(layout, memory)
    for (file, begin, end, align), place in zip(extents, layout.places, strict=True):
        assert memory[place : place + end - begin].tobytes() == data[file][begin:end]
        assert place % align == 0
    before = reader.bytes
    window = np.zeros(20 * 30 * 2, dtype=np.uint8)
    reader.read_rows((0, 100, 100 + 2 * 50 * 60, 2), (50, 60), (7, 27), (11, 41), window)
    stored = np.frombuffer(data[0][100 : 100 + 6000], dtype=np.uint16).reshape(50, 60)
    assert window.view(np.uint16).reshape(20, 30).tolist() == stored[7:27, 11:41].tolist()
    assert reader.bytes >= before + len(window)


def test_a_file_that_shrank_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write(path, 50_000)
    reader = _core.Reader([(str(path), 50_000)], "buffered", 2)
    os.truncate(path, 20_000)
    layout = _core.layout([(0, 0, 50_000, 1)])
    with pytest.raises(CheckpointError, match=r"shard"):
        reader.read(layout, np.zeros(layout.bytes, dtype=np.uint8))
    with pytest.raises(CheckpointError, match=r"gone"):
        _core.Reader([(str(tmp_path / "gone"), 5)], "mmap", 2)
    with pytest.raises(ValueError, match="mode 'paper'"):
        _core.Reader([], "paper", 2)


def test_a_stream_hands_out_every_job_in_order(tmp_path: Path) -> None:
    data = write(tmp_path / "shard", 64_000)
    reader = _core.Reader([(str(tmp_path / "shard"), len(data))], "buffered", 2)
    jobs = [_core.layout([(0, 1000 * i, 1000 * i + 5000, 1)]) for i in (3, 50, 7, 7, 0)]
    slots = [np.zeros(16_384, dtype=np.uint8) for _ in range(2)]
    stream = _core.Stream(reader, slots, jobs)
    for expected, start in enumerate((3, 50, 7, 7, 0)):
        lease = stream.next()
        assert lease is not None
        job, slot = lease
        assert job == expected
        place = jobs[job].places[0]
        assert slots[slot][place : place + 5000].tobytes() == data[1000 * start :][:5000]
        stream.release(slot)
    assert stream.next() is None
    assert stream.counts()["bytes"] == 5 * 5000
    stream.close()
    assert stream.counts()["bytes"] == 5 * 5000
    assert stream.next() is None


def test_a_closed_stream_reads_no_further(tmp_path: Path) -> None:
    data = write(tmp_path / "shard", 64_000)
    reader = _core.Reader([(str(tmp_path / "shard"), len(data))], "buffered", 2)
    jobs = [_core.layout([(0, 0, 8000, 1)])] * 50
    stream = _core.Stream(reader, [np.zeros(8192, dtype=np.uint8)], jobs)
    assert stream.next() == (0, 0)
    stream.close()
    assert stream.counts()["bytes"] <= 2 * 8000


def test_a_slot_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "shard", 64_000)
    reader = _core.Reader([(str(tmp_path / "shard"), 64_000)], "buffered", 2)
    with pytest.raises(ValueError, match="8000 bytes do not fit"):
        _core.Stream(reader, [np.zeros(10, dtype=np.uint8)], [_core.layout([(0, 0, 8000, 1)])])


def test_hashes_follow_headers_and_not_weights(tmp_path: Path) -> None:
    def store(folder: Path, fill: int, name: str = "a") -> str:
        folder.mkdir()
        header = f'{{"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}'.encode()
        body = len(header).to_bytes(8, "little") + header + bytes([fill] * 4)
        (folder / "model.safetensors").write_bytes(body)
        return _core.Catalogue(folder).sha256

    first, second = store(tmp_path / "1", 0), store(tmp_path / "2", 9)
    assert first == second
    assert first != store(tmp_path / "3", 0, "b")
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert _core.Catalogue(str(tmp_path / "1")).entries()[0][:4] == ("a", 0, "U8", [4])
    assert _core.dtype_bytes("BF16") == 2
    with pytest.raises(ValueError, match="dtype 'X'"):
        _core.dtype_bytes("X")
