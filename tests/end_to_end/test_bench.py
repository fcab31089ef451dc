"""`pkt bench` as a user meets it: what each command prints, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from commands import Inputs, build_inputs, pkt


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("bench"))


def holes_only(model: Path, folder: Path) -> Path:
    """The model with the bytes of its weights punched out: headers and holes."""
    folder.mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(content)
            continue
        header = 8 + int.from_bytes(content[:8], "little")
        with (folder / path.name).open("wb") as file:
            file.write(content[:header])
            file.truncate(len(content))
    return folder


def test_help_is_shown_without_a_command() -> None:
    shown = pkt("bench")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"\n  {name} " in shown.out for name in ("read", "score", "window", "extract"))


def test_read_measures_a_teachers_files(inputs: Inputs) -> None:
    shown = pkt("bench", "read", "--teacher", inputs.teacher, "--json")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert {"raw buffered", "buffered", "mmap"} <= found["rates"].keys()
    raw = [r["gigabytes_per_second"] for n, r in found["rates"].items() if n.startswith("raw")]
    assert found["best_raw"] == max(raw) > 0
    for rate in found["rates"].values():
        share = rate["gigabytes_per_second"] / found["best_raw"]
        assert rate["of_best_raw"] == pytest.approx(share)
        assert rate["bytes"] > 0
    table = pkt("bench", "read", "--teacher", inputs.teacher).out.splitlines()
    assert table[0].split()[0] == "GB/s"
    assert {line.split("  ")[0] for line in table[1:]} == found["rates"].keys()


def test_read_makes_a_file_of_its_own_and_removes_it(tmp_path: Path) -> None:
    shown = pkt("bench", "read", "--size", "1MiB", "--folder", tmp_path, "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["best_raw"] > 0
    assert list(tmp_path.iterdir()) == []


def test_read_takes_no_more_than_half_of_the_disk(tmp_path: Path) -> None:
    ended = pkt("bench", "read", "--size", "1000TiB", "--folder", tmp_path)
    assert ended.code == 1
    assert str(tmp_path) in ended.error
    assert "--size" in ended.hint
    missing = pkt("bench", "read", "--size", "1MiB", "--folder", tmp_path / "none")
    assert missing.code == 1
    assert "No such file" in missing.error
    assert pkt("bench", "read", "--size", "much").code == 2
    assert pkt("bench", "read", "--size", "0").code == 2


def test_ctrl_c_removes_the_temporary_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pkt", "bench", "read", "--folder", str(tmp_path)]
    process = subprocess.Popen([*command, "--size", "1GiB"], stderr=subprocess.PIPE, text=True)
    while not any(tmp_path.glob("*/random")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert list(tmp_path.iterdir()) == []


def test_score_and_window_take_the_teachers_shape(inputs: Inputs) -> None:
    scored = json.loads(pkt("bench", "score", "--teacher", inputs.teacher, "--json").out)
    assert {scored["rows"], scored["columns"]} == {48, 80}
    rates = [value for name, value in scored.items() if name.endswith(("second", "teraflops"))]
    assert len(rates) == 5
    assert all(rate > 0 for rate in rates)
    found = pkt("bench", "window", "--teacher", inputs.teacher, "--square", 32, "--json")
    searched = json.loads(found.out)
    assert (searched["window_rows"], searched["window_columns"]) == (
        searched["rows"] // 2, searched["columns"] // 2,
    )  # fmt: skip
    assert [product["dtype"] for product in searched["matmul"]] == ["bfloat16", "float32"]
    assert all(product["teraflops"] > 0 for product in searched["matmul"])
    for name, word in (("score", "dYᵀX made"), ("window", "best window")):
        more = ["--square", 32] if name == "window" else []
        assert word in pkt("bench", name, "--teacher", inputs.teacher, *more).out


def test_extract_forecasts_every_phase(inputs: Inputs, tmp_path: Path) -> None:
    command = ["bench", "extract", *inputs.options(), "--folder", tmp_path]
    shown = pkt(*command, "--json", "-q")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert [p["name"] for p in found["phases"]] == [
        "embedding and head", "forward", "backward", "factors",
    ]  # fmt: skip
    assert found["seconds"] == pytest.approx(sum(p["seconds"] for p in found["phases"]))
    assert all(found["pace"][name] > 0 for name in ("forward", "backward", "head", "factors"))
    assert found["bound"] in ("disk", "arithmetic and scoring", "factors")
    assert found["work"]["seeds"] == 4
    assert found["work"]["layers"] == 4
    assert not found["own_file"]
    assert list(tmp_path.iterdir()) == []
    text = pkt(*command)
    assert text.code == 0
    last = text.out.splitlines()[-1]
    assert last.startswith(f"{inputs.teacher}: ")
    assert ", bound by " in last
    assert "measured: backward" in text.err


@pytest.mark.parametrize("more", [(), ("--embeddings",), ("--select", "consistent")])
def test_extract_needs_no_more_than_headers(
    more: tuple[str, ...], inputs: Inputs, tmp_path: Path
) -> None:
    teacher = holes_only(inputs.teacher, tmp_path / "teacher")
    student = holes_only(inputs.student, tmp_path / "student")
    (tmp_path / "work").mkdir()
    shown = pkt(
        "bench", "extract", "--teacher", teacher, "--student", student, "--limit", 2,
        "--max-tokens", 9, "--folder", tmp_path / "work", "--json", "-q", *more,
    )  # fmt: skip
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert (found["work"]["seeds"], found["work"]["tokens"]) == (2, 18)
    assert ("ends" in [p["name"] for p in found["phases"]]) == ("--embeddings" in more)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "more", [(), ("--embeddings",), ("--select", "top-weights"), ("--select", "rows-cols")]
)
def test_the_forecast_reads_what_the_plan_does(more: tuple[str, ...], inputs: Inputs) -> None:
    given = ("--teacher", inputs.teacher, "--student", inputs.student, *more)
    shown = pkt("bench", "extract", *given, "--limit", 2, "--max-tokens", 9, "--json", "-q")
    assert (shown.code, shown.err) == (0, "")
    work = json.loads(shown.out)["work"]
    again = work["layers"] - work["slots"]
    read = (work["layers"] + again) * work["layer_bytes"]
    read += work["ends_reads"] * work["ends_bytes"] + work["window_bytes"]
    plan = json.loads(pkt("inspect", *given, "--limit", 2, "--max-tokens", 9, "--json").out)["plan"]
    assert read == pytest.approx(plan["read_bytes"], rel=0.002)


def test_a_matrix_that_memory_has_no_room_for_is_refused(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkt.bench.kernels.memory_limit", lambda: (1 << 20, "cgroup memory.max"))
    for words in (["score", "--teacher", inputs.teacher], ["score"], ["window"]):
        ended = pkt("bench", *words)
        assert ended.code == 4
        assert "cgroup memory.max leaves 1.00 MiB" in ended.error


def test_a_number_among_the_weights_of_a_layer_is_no_product(
    inputs: Inputs, tmp_path: Path
) -> None:
    """As the masked_bias of published GPT-NeoX models, which has no shape."""
    from safetensors.torch import load_file, save_file

    teacher, name = tmp_path / "teacher", "model.safetensors"
    shutil.copytree(inputs.teacher, teacher)
    bias = {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e9)}
    save_file(load_file(teacher / name) | bias, teacher / name, {"format": "pt"})
    given = ("--teacher", teacher, "--student", inputs.student, "--limit", 2, "--max-tokens", 9)
    assert pkt("bench", "extract", *given, "--folder", tmp_path, "-q").code == 0
    assert pkt("bench", "score", "--teacher", teacher).code == 0


def test_extract_refuses_as_extract_does(inputs: Inputs) -> None:
    assert pkt("bench", "extract", "--teacher", inputs.teacher).code == 2
    turned = ["--teacher", inputs.student, "--student", inputs.teacher]
    assert pkt("bench", "extract", *turned).code == 3
    small = pkt("bench", "extract", *inputs.options(), "--max-ram", "1MiB", "-q")
    assert small.code == 4
    assert "smallest" in small.hint
    lost = pkt("bench", "extract", *inputs.options(seeds="nowhere.jsonl"))
    assert lost.code == 5


def test_a_model_of_holes_alone_cannot_be_read(inputs: Inputs, tmp_path: Path) -> None:
    folder = holes_only(inputs.teacher, tmp_path / "model")
    ended = pkt("bench", "read", "--teacher", folder)
    assert ended.code == 1
    assert str(folder) in ended.error
    assert "holes" in ended.error
    assert "--teacher" in ended.hint
