"""Targets against plain transformers with the whole teacher in memory; killed, resumed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import pkt
import runs
import tiny
from pkt.api import prepare_targets
from pkt.batches import batches
from pkt.errors import BudgetError, DataError, IncompatibleError, OutputError, UsageError
from pkt.targets import FOLDER, Targets, row_bytes
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"top_k": 7, "dtype": "float32"}
FAMILIES = ["llama", "qwen2", "gemma3", "gpt_neox", "gemma2"]


def write(folder: Path, out: Path, **options: Any) -> pkt.records.Recording:
    paths = [options.pop(name, folder / name) for name in ("teacher", "student", "data.jsonl")]
    return pkt.write_targets(*map(str, paths), out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    build_pair(folder, "llama", "llama", big={"shards": 3})
    write_seeds(folder / "data.jsonl", count=7)
    return folder


@pytest.fixture(scope="module")
def whole(pair: Path) -> dict[str, bytes]:
    """The bytes of an uninterrupted run, in three files."""
    with small_shards():
        write(pair, pair / "whole")
    return runs.contents(pair / "whole")


def small_shards() -> Any:
    return mock.patch("pkt.targets.SHARD_BYTES", 20 * row_bytes(OPTIONS["top_k"]))


def dense(folder: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits (rows, V) and tokens of every answer position, from one model in memory."""
    task = prepare_targets(*(str(folder / n) for n in ("teacher", "student", "data.jsonl")))
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    logits, tokens, counts = [], [], []
    for sample in task.samples.samples:
        ids = torch.tensor([sample.tokens])
        at = torch.tensor(sample.loss_mask).nonzero()[:, 0]
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[0, at - 1])
        tokens.append(ids[0, at])
        counts.append(len(at))
    return torch.cat(logits), torch.cat(tokens), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_against_a_plain_forward(family: str, tmp_path: Path) -> None:
    build_pair(tmp_path, family, "llama")
    write_seeds(tmp_path / "data.jsonl")
    made = write(tmp_path, tmp_path / "out")
    logits, tokens, counts = dense(tmp_path, tmp_path / "out")
    held = Targets(tmp_path / "out" / FOLDER)
    rows = made.manifest["vocabulary"]["rows"]
    assert held.answers == counts
    every = [held.of(number) for number in range(len(counts))]
    values = torch.cat([top.logits for top in every])
    wanted = logits[:, :rows].topk(OPTIONS["top_k"], -1).values
    assert torch.allclose(values, wanted, rtol=1e-5, atol=1e-5)
    ids = torch.cat([top.ids for top in every]).long()
    assert torch.allclose(logits.gather(-1, ids), wanted, rtol=1e-5, atol=1e-5)
    total = torch.cat([top.logsumexp for top in every])
    assert torch.allclose(total, logits[:, :rows].double().logsumexp(-1), rtol=1e-5, atol=1e-5)
    p = logits[:, :rows].double().log_softmax(-1)
    loss = -p.gather(-1, tokens[:, None]).mean()
    tail = 1 - p.exp().sort(-1, descending=True).values[:, : OPTIONS["top_k"]].sum(-1)
    assert made.manifest["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert made.manifest["tail"] == pytest.approx(float(tail.mean()), rel=1e-4)


def test_the_whole_vocabulary(pair: Path, tmp_path: Path) -> None:
    made = write(pair, tmp_path / "out", top_k=0, max_examples=2)
    rows = made.manifest["vocabulary"]["rows"]
    top = Targets(tmp_path / "out" / FOLDER).of(0)
    assert top.ids.shape[1] == rows
    assert torch.equal(top.ids.long().sort(-1).values, torch.arange(rows).expand_as(top.ids))
    assert made.manifest["tail"] == 0


def test_reading_modes_slots_and_places_change_no_byte(
    pair: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert len([name for name in whole if name.endswith(".safetensors")]) >= 3
    with small_shards():
        for number, options in enumerate([
            {"io": "mmap"}, {"io": "direct"}, {"spool_dir": tmp_path / "elsewhere"},
            {"max_ram": "12GiB"},
        ]):  # fmt: skip
            write(pair, tmp_path / f"{number}", **options)
            assert runs.contents(tmp_path / f"{number}") == whole
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "step", [("forward", 1), ("forward", 3), ("forward", 4), ("targets", 1), ("targets", 4),
             ("targets", 6), ("targets", 7)],
)  # fmt: skip
def test_ctrl_c_after_a_step_keeps_it(
    step: tuple[str, int], pair: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == step:
            raise KeyboardInterrupt

    seen: list[tuple[str, int]] = []
    with small_shards():
        with pytest.raises(KeyboardInterrupt):
            write(pair, tmp_path / "out", notify=stop)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
        write(pair, tmp_path / "out", notify=lambda phase, done, _: seen.append((phase, done)))
    assert runs.contents(tmp_path / "out") == whole
    forward = [done for phase, done in seen if phase == "forward"]
    assert len(forward) == (4 - step[1] if step[0] == "forward" else 0)
    assert (tmp_path / "out" / ".work").exists() is False


@pytest.mark.parametrize("damage", ["flip", "gone"])
@pytest.mark.parametrize("name", ["input-00004.bin", "logits"])
def test_damaged_work_is_made_again(
    name: str, damage: str, pair: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("targets", 6):
            raise KeyboardInterrupt

    with small_shards():
        with pytest.raises(KeyboardInterrupt):
            write(pair, tmp_path / "out", notify=stop)
        work = tmp_path / "out" / ".work"
        path = work / "spool" / name
        if name == "logits":
            path = sorted((work / "result" / FOLDER).glob("logits-*.safetensors"))[0]
        if damage == "gone":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        write(pair, tmp_path / "out")
    assert runs.contents(tmp_path / "out") == whole


@pytest.mark.parametrize("moments", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_with_the_same_bytes(
    moments: int, pair: Path, tmp_path: Path
) -> None:
    paths = (pair / "teacher", pair / "student", pair / "data.jsonl")
    draw, kills = random.Random(moments), 0
    with runs.Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="write_targets", **OPTIONS)
        assert code == 0, text
        length = time.monotonic() - began
        for number in range(moments):
            out = tmp_path / f"{number}"
            process = nursery.start(*paths, out, call="write_targets", **OPTIONS)
            time.sleep(draw.uniform(0.05, 0.6) * length)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            kills += nursery.finish()[0] == -signal.SIGKILL
            code, text = nursery.run(*paths, out, call="write_targets", **OPTIONS)
            assert code == 0, text
            assert runs.contents(out) == runs.contents(tmp_path / "whole")
    assert kills


def test_a_finished_run_is_returned_and_another_one_refused(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = write(pair, out)
    at = (out / FOLDER / "index.json").stat().st_mtime_ns
    assert write(pair, out).manifest == made.manifest
    assert (out / FOLDER / "index.json").stat().st_mtime_ns == at
    with pytest.raises(OutputError, match="expected an empty folder"):
        write(pair, out, top_k=3)
    again = write(pair, out, top_k=3, overwrite=True)
    assert again.manifest["options"]["top_k"] == 3


def test_the_plan_is_of_the_run(pair: Path, tmp_path: Path) -> None:
    """What is written is what was planned; what is held stays below it."""
    out = tmp_path / "out"
    task = prepare_targets(
        *(str(pair / n) for n in ("teacher", "student", "data.jsonl")), **OPTIONS, output_dir=out
    )
    made = write(pair, out)
    size = sum(path.stat().st_size for path in (out / FOLDER).glob("*.safetensors"))
    assert 0 <= size - task.plan.record_bytes < 1000  # headers
    tokens, width = task.samples.tokens, task.teacher.hidden_size
    assert task.plan.spool_bytes == 2 * tokens * width * 4
    assert made.run["bytes_read"] == task.plan.read_bytes + sum(
        piece.bytes for name, piece in task.teacher.checkpoint.outer.items() if "norm" in name
    )


def test_the_spool_is_never_larger_than_planned(pair: Path, tmp_path: Path) -> None:
    task = prepare_targets(
        *(str(pair / n) for n in ("teacher", "student", "data.jsonl")), **OPTIONS
    )
    largest = 0

    def look(phase: str, done: int, total: int) -> None:
        nonlocal largest
        spool = tmp_path / "out" / ".work" / "spool"
        largest = max(largest, sum(path.stat().st_size for path in spool.glob("*.bin")))

    write(pair, tmp_path / "out", notify=look)
    assert task.plan.spool_bytes / 2 < largest <= task.plan.spool_bytes


# Bad input


def test_too_little_memory_or_disk(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="at its peak") as error:
        write(pair, tmp_path / "out", max_ram="100MiB")
    assert "--max-ram" in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    full = mock.patch(
        "pkt.workplace.shutil.disk_usage", return_value=mock.Mock(free=5000, total=10**6)
    )
    with full, pytest.raises(BudgetError, match="its disk has") as error:
        write(pair, tmp_path / "out")
    assert "--max-examples" in str(error.value.hint)


def test_another_tokenizer(pair: Path, tmp_path: Path) -> None:
    other = tiny.build("llama", tmp_path / "other", "student", vocab=140)
    tiny.write_tokenizer(other, 140)
    with pytest.raises(IncompatibleError, match="two tokenizers differ"):
        write(pair, tmp_path / "out", student=other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(IncompatibleError, match=r"no tokenizer\.json"):
        write(pair, tmp_path / "out", student=other)


def test_examples_longer_than_the_teacher(pair: Path, tmp_path: Path) -> None:
    short = tiny.build("llama", tmp_path / "short", "teacher", vocab=128, max_position_embeddings=8)
    tiny.write_tokenizer(short, 128)
    with pytest.raises(IncompatibleError, match=r"the teacher .* takes 8") as error:
        write(pair, tmp_path / "out", teacher=short)
    assert "--max-tokens 8" in str(error.value.hint)


def test_odd_requests(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--top-k -1"):
        write(pair, tmp_path / "out", top_k=-1)
    bad = tmp_path / "data.jsonl"
    bad.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"data.jsonl:1"):
        write(pair, tmp_path / "out", **{"data.jsonl": bad})


def test_what_is_not_finite_is_named(pair: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tiny.build("llama", tmp_path / "broken", "teacher", vocab=128)
    tiny.write_tokenizer(broken, 128)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(pkt.errors.CheckpointError, match=r"model\.norm\.weight.*nan"):
        write(pair, tmp_path / "out", teacher=broken)


def test_the_manifest_names_what_the_targets_are_of(pair: Path, tmp_path: Path) -> None:
    made = write(pair, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "pkt_manifest.json").read_text())
    assert held == made.manifest
    assert held["method"] == "targets"
    assert held["options"] == {
        "top_k": 7, "dtype": "F32", "template": "paper", "max_tokens": 2048, "max_examples": 1000,
    }  # fmt: skip
    assert held["data"]["count"] == 7
    assert str(pair) not in json.dumps(held)


def like_lengths(path: Path) -> None:
    """Three texts that share a batch, one of them padded."""
    words = ["fox", *["hill"] * 15]
    lines = [json.dumps({"text": " ".join(words[:count])}) for count in (16, 15, 16)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_no_trace(family: str, tmp_path: Path) -> None:
    build_pair(tmp_path, family, "llama")
    like_lengths(tmp_path / "data.jsonl")
    made = write(tmp_path, tmp_path / "out")
    logits, _, counts = dense(tmp_path, tmp_path / "out")
    assert len(set(counts)) > 1
    assert len(batches([count + 1 for count in counts])) == 1
    held = Targets(tmp_path / "out" / FOLDER)
    total = torch.cat([held.of(number).logsumexp for number in range(len(counts))])
    rows = made.manifest["vocabulary"]["rows"]
    assert torch.allclose(total, logits[:, :rows].double().logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_teacher_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    build_pair(tmp_path, "gemma3", "llama", big={"use_bidirectional_attention": True})
    like_lengths(tmp_path / "data.jsonl")
    with pytest.raises(IncompatibleError, match="looks ahead of a position"):
        write(tmp_path, tmp_path / "out")
