"""The work folder: whole files or none, checksums that notice everything, clear errors."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt.errors import OutputError
from pkt.sweep.spool import DamagedError, Scratch, Spool, disk_errors, durable

LENGTHS = (3, 1, 5)


def blocks(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, generator=draw).to(dtype) for n in LENGTHS]


def spool_in(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Spool:
    return Spool(folder / "spool", LENGTHS, 4, dtype)


def fill(spool: Spool, name: str = "input", seed: int = 0) -> list[torch.Tensor]:
    written = blocks(seed, spool.dtype)
    with spool.writer(name) as out:
        for block in written:
            out.append(block)
    return written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    spool = spool_in(tmp_path, dtype)
    written = fill(spool)
    for again in (spool, spool_in(tmp_path, dtype)):  # another process would see the same
        assert again.holds("input")
        for seed in (2, 0, 1):
            assert torch.equal(again.read("input", seed), written[seed])


def test_a_block_that_is_not_contiguous_is_written_in_order(tmp_path: Path) -> None:
    spool = spool_in(tmp_path, torch.float32)
    turned = torch.arange(20.0).view(4, 5).T  # (5, 4), strides 1 and 5
    with spool.writer("x") as out:
        for block in (turned[:3], turned[3:4], turned):
            out.append(block)
    assert torch.equal(spool.read("x", 2), turned)


def is_damaged(spool: Spool) -> bool:
    """Whether reading every block is refused, by the process that wrote the file or by another."""
    try:
        for seed in range(len(LENGTHS)):
            spool.read("input", seed)
    except DamagedError as error:
        return error.name == "input"
    return False


def fail_within(spool: Spool, seed: int = 0) -> None:
    with spool.writer("input") as out:
        out.append(blocks(seed)[0])
        raise RuntimeError("seed 2")


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with pytest.raises(RuntimeError, match="seed 2"):
        fail_within(spool)
    assert not spool.holds("input")
    assert list((tmp_path / "spool").iterdir()) == []


def test_an_error_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    written = fill(spool)
    with pytest.raises(RuntimeError, match="seed 2"):
        fail_within(spool, seed=1)
    again = spool_in(tmp_path)
    assert again.holds("input")
    assert torch.equal(again.read("input", 0), written[0])


@pytest.mark.parametrize("at", [0, 1, 35, 71])
def test_one_flipped_bit_is_noticed(at: int, tmp_path: Path) -> None:
    fill(spool_in(tmp_path))
    path = tmp_path / "spool" / "input.bin"
    data = bytearray(path.read_bytes())
    assert len(data) == 72
    data[at] ^= 16
    path.write_bytes(data)
    assert is_damaged(spool_in(tmp_path))


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""])
def test_another_length_is_noticed(change: Any, tmp_path: Path) -> None:
    fill(spool_in(tmp_path))
    path = tmp_path / "spool" / "input.bin"
    path.write_bytes(change(path.read_bytes()))
    assert is_damaged(spool_in(tmp_path))


def test_other_blocks_of_a_damaged_file_can_be_read(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    written = fill(spool)
    path = tmp_path / "spool" / "input.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert spool.holds("input")
    assert torch.equal(spool.read("input", 0), written[0])
    with pytest.raises(DamagedError, match="not the ones that this run wrote"):
        spool.read("input", 2)
    assert is_damaged(spool_in(tmp_path))


@pytest.mark.parametrize("sums", [[1, 2], [1, 2, "3"], None, {}, [1, 2, 3, 4]])
def test_checksums_of_another_run_are_none(sums: Any, tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    fill(spool)
    spool.put("input.sum", sums)
    assert is_damaged(spool_in(tmp_path))


def test_tensors_may_lie_elsewhere(tmp_path: Path) -> None:
    tensors = tmp_path / "scratch"
    tensors.mkdir()
    spool = Spool(tmp_path / "spool", LENGTHS, 4, torch.bfloat16, tensors)
    written = fill(spool)
    spool.put("r", 1)
    with spool.scratch("rows", 7, 4):
        assert (tensors / "rows.tmp").exists()
    assert sorted(path.name for path in tensors.iterdir()) == ["input.bin", "input.sum.json"]
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["r.json"]
    assert torch.equal(spool.read("input", 1), written[1])
    for path in tensors.iterdir():
        path.unlink()
    assert not spool.holds("input")
    assert spool.get("r") == 1


def test_a_new_file_with_an_old_checksum_is_noticed(tmp_path: Path) -> None:
    """A kill may fall between the two renames."""
    fill(spool_in(tmp_path))
    sums = (tmp_path / "spool" / "input.sum.json").read_bytes()
    fill(spool_in(tmp_path), seed=1)
    (tmp_path / "spool" / "input.sum.json").write_bytes(sums)
    assert is_damaged(spool_in(tmp_path))


def test_a_dropped_file_is_not_there(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    fill(spool)
    spool.drop("input")
    spool.drop("input")
    assert not spool.holds("input")
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("record", [None, [], {}, [1.5, 2**53], {"ä": [None, True, 1e-300]}, "x"])
def test_records_come_back_exactly(record: Any, tmp_path: Path) -> None:
    spool_in(tmp_path).put("r", record)
    assert spool_in(tmp_path).get("r") == record


def test_floats_come_back_bit_by_bit(tmp_path: Path) -> None:
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spool_in(tmp_path).put("losses", values.tolist())
    assert spool_in(tmp_path).get("losses") == values.tolist()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"record": 1}', b'{"sha256": "x", "record": [1.5]}', b"\xff\xfe"],
)
def test_a_damaged_record_is_none(damage: bytes, tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    assert spool.get("r") is None
    spool.put("r", [1.5])
    (tmp_path / "spool" / "r.json").write_bytes(damage)
    assert spool.get("r") is None


def test_a_changed_number_in_a_record_is_noticed(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    spool.put("r", {"score": 1.5})
    path = tmp_path / "spool" / "r.json"
    path.write_text(path.read_text().replace("1.5", "1.6"))
    assert json.loads(path.read_text())["record"] == {"score": 1.6}
    assert spool.get("r") is None


def test_a_mapped_scratch_is_gone_afterwards(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with spool.scratch("rows", 7, 4) as rows:
        assert rows.shape == (7, 4)
        rows.fill_(2)
        assert list((tmp_path / "spool").iterdir())
    assert list((tmp_path / "spool").iterdir()) == []


def test_scratch_files_hold_a_block_a_seed(tmp_path: Path) -> None:
    wide = [torch.randn(n, 9) for n in LENGTHS]
    scratch = Scratch(tmp_path / "x", LENGTHS, wide[0])
    for seed in (2, 0, 1, 0):
        scratch.write(seed, wide[seed])
    for seed in range(3):
        assert torch.equal(scratch.read(seed), wide[seed])
    scratch.close()
    assert not (tmp_path / "x").exists()


def test_a_file_that_was_cut_says_what_to_do(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    fill(spool)
    (tmp_path / "spool" / "input.bin").write_bytes(b"")
    with pytest.raises(OutputError, match="or not as long as this run wrote it") as caught:
        spool.read("input", 0)
    assert "same command again" in str(caught.value.hint)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    for code, text in (
        (errno.ENOSPC, "the disk is full; finished layers are kept"),
        (errno.EDQUOT, "the disk is full; finished layers are kept"),
        (errno.EIO, "cannot write: "),
    ):
        with pytest.raises(OutputError, match=text) as caught, disk_errors(tmp_path / "f"):
            raise OSError(code, "no")
        assert str(tmp_path / "f") in str(caught.value)
        assert caught.value.exit_code == 1
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OutputError, match="disk is full"), disk_errors(full):
            full.write_bytes(b"x" * 10)


def test_a_durable_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with durable(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"

    def interrupted() -> None:
        with durable(path) as file:
            file.write(b"other")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"half"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_cannot_be_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Spool(tmp_path / "file" / "spool", LENGTHS, 4, torch.float32)
