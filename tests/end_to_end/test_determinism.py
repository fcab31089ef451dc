"""Laws 3, 4 and 6: the same bytes in every file, however it was read, held or scheduled.

Every file of OUT but pkt_run.json counts. What was drawn from is hashed in place of the pictures
(see `runs`), except in the one test that draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import pkt
import runs
from pkt.api import execute, prepare
from pkt.records import Extraction
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
RANK = 4


class Case:
    """One pair; its teacher in bfloat16, in one file and in shards."""

    def __init__(self, folder: Path, nursery: runs.Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        big = {"dtype": torch.bfloat16}
        self.teacher, self.student = build_pair(folder, "llama", "llama", big=big)
        sharded = build_pair(folder / "sharded", "llama", "llama", big={**big, "shards": 4})
        self.sharded = sharded[0]
        self.seeds = write_seeds(folder / "seeds.jsonl", count=4)
        self.many = write_seeds(folder / "many.jsonl", count=64)
        self.count = 0

    def extract(self, **options: Any) -> Extraction:
        paths = [options.pop(name, getattr(self, name)) for name in ("teacher", "student", "seeds")]
        self.count += 1
        out = self.folder / f"out-{self.count}"
        return pkt.extract(*map(str, paths), out, **{"rank": RANK, **options})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with runs.Nursery() as nursery:
        yield Case(tmp_path_factory.mktemp("determinism"), nursery)


@pytest.mark.usefixtures("pictures")
def test_two_runs_write_the_same_files_pictures_too(case: Case) -> None:
    first = case.extract(io="mmap", embeddings=True)
    second = case.extract(io="direct", embeddings=True, max_ram="8GiB")
    ours, theirs = runs.contents(first.folder), runs.contents(second.folder)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert {"README.md", "report/index.html", "report/layer_scores.png", "report/spectra.png"} <= {
        *ours
    }
    assert sum(name.endswith(".png") for name in ours) == 6  # scores, spectra, 3 layers, ends


@pytest.mark.parametrize("select", ["window", "rows-cols", "consistent", "random-weights"])
def test_reading_modes_give_the_same_bytes(select: str, case: Case) -> None:
    made = {
        io: case.extract(io=io, select=select, embeddings=True)
        for io in ("auto", "mmap", "buffered", "direct")
    }
    assert made["mmap"].run["io"] == "mmap"
    assert made["buffered"].run["io"] == "buffered"
    found = [runs.contents(each.folder) for each in made.values()]
    assert all(files == found[0] for files in found)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"embeddings": True, "dtype": "bfloat16"}),
        ("qwen2", {"dtype": "float32", "select": "top-weights"}),
        ("gemma2", {"dtype": "float32"}),
        ("phi3", {"dtype": "bfloat16"}),
        ("gpt_neox", {"dtype": "float32"}),
        ("llama", {"embeddings": True, "dtype": "float32", "select": "consistent"}),
    ],
)
def test_every_setting_of_the_plan_gives_the_same_bytes(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Law 4: scores of a layer at once or (X, dY) spooled and one matrix at a time; read ahead."""
    teacher, student = build_pair(tmp_path, family, family)
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    task = prepare(str(teacher), str(student), seeds, rank=RANK, **options)
    found = []
    for slots in (3, 2, 1):
        for scores in ("layer", "matrix"):
            plan = replace(task.plan, slots=slots, scores=scores)  # type: ignore[arg-type]
            out = tmp_path / f"{slots}-{scores}"
            made = execute(replace(task, plan=plan), out)
            assert (made.run["slots"], made.run["scores"]) == (slots, scores)
            found.append(runs.contents(out))
    assert all(files == found[0] for files in found)


def test_the_smallest_budget_gives_the_same_bytes(case: Case) -> None:
    task = prepare(str(case.teacher), str(case.student), case.seeds, rank=RANK)
    smallest = f"{task.plan.smallest_bytes >> 20}MiB"
    small, large = case.extract(max_ram=smallest), case.extract(max_ram="64GiB")
    assert small.run["budget_bytes"] == task.plan.smallest_bytes
    assert runs.contents(small.folder) == runs.contents(large.folder)


def test_kernel_threads_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    found = []
    for threads in (1, 2, 3, 5):
        out = tmp_path / f"{threads}"
        case.nursery.start(
            case.teacher, case.student, case.seeds, out,
            env={"RAYON_NUM_THREADS": str(threads)}, rank=RANK, embeddings=True,
        )  # fmt: skip
        code, text = case.nursery.finish()
        assert code == 0, text
        found.append(runs.contents(out))
    assert all(files == found[0] for files in found)


def test_another_process_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = case.nursery.run(case.teacher, case.student, case.seeds, out, rank=RANK)
    assert code == 0, text
    assert runs.contents(out) == runs.contents(case.extract().folder)


def test_shards_change_the_hash_of_the_teacher_alone(case: Case) -> None:
    one, several = (
        case.extract(embeddings=True),
        case.extract(teacher=case.sharded, embeddings=True),
    )
    ours, theirs = runs.contents(one.folder), runs.contents(several.folder)
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    assert ours["adapter_config.json"] == theirs["adapter_config.json"]
    first, second = (json.loads(files["pkt_manifest.json"]) for files in (ours, theirs))
    assert first["teacher"].pop("headers_sha256") != second["teacher"].pop("headers_sha256")
    assert first == second


def test_the_manifest_holds_no_path_time_or_host(case: Case, tmp_path: Path) -> None:
    """The same files elsewhere, under other names, give the same manifest."""
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    for name in ("teacher", "student"):
        (case.folder / name).rename(elsewhere / f"my-{name}")
    try:
        made = case.extract(teacher=elsewhere / "my-teacher", student=elsewhere / "my-student")
    finally:
        for name in ("teacher", "student"):
            (elsewhere / f"my-{name}").rename(case.folder / name)
    manifest = (made.folder / "pkt_manifest.json").read_bytes()
    assert manifest == runs.contents(case.extract().folder)["pkt_manifest.json"]
    assert str(case.folder.parent) not in manifest.decode()


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each stored tensor."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    return found


def window_bytes(made: Extraction, item: int) -> int:
    total = 0
    for window in made.manifest["windows"].values():
        (top, bottom), (left, right) = window["rows"], window["cols"]
        total += (bottom - top) * (right - left) * item
    return total


LAST = ("model.layers.2.", "model.layers.3.")


@pytest.mark.parametrize("io", ["mmap", "buffered"])
@pytest.mark.parametrize("teacher", ["teacher", "sharded"])
def test_bytes_read_are_two_passes_and_the_windows(
    teacher: str, io: str, case: Case, tmp_path: Path
) -> None:
    """Law 3, exactly: layers twice but those in memory at the turn, all else once."""
    folder = getattr(case, teacher)
    stored = sizes(folder)
    again = sum(size for name, size in stored.items() if ".layers." in name) - sum(
        size for name, size in stored.items() if name.startswith(LAST)
    )
    made = {}
    for name, path in (("few", case.seeds), ("many", case.many)):
        task = prepare(str(folder), str(case.student), path, rank=RANK, limit=0)
        task = replace(task, plan=replace(task.plan, slots=len(LAST)))
        made[name] = execute(task, tmp_path / name, io=io)
    total = sum(stored.values())
    for each in made.values():
        windows = window_bytes(each, item=2)
        assert each.run["checkpoint_bytes"] == total
        assert each.run["bytes_read"] == again + total + windows
        assert each.run["bytes_read"] <= 2.05 * total + windows
    assert made["few"].manifest["seeds"]["count"] == 4
    assert made["many"].manifest["seeds"]["count"] == 64
    assert made["few"].run["bytes_read"] == made["many"].run["bytes_read"]


@pytest.mark.parametrize("tied", [False, True])
def test_ends_are_read_again_but_no_layer(tied: bool, tmp_path: Path) -> None:
    """Embedding and head: once more each for their scores, and their windows."""
    teacher, student = build_pair(tmp_path, "llama", "llama", tied=tied)
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    made = pkt.extract(
        str(teacher), str(student), seeds, tmp_path / "out", rank=RANK, embeddings=True, io="mmap"
    )
    stored = sizes(teacher)
    layers = sum(size for name, size in stored.items() if ".layers." in name)
    embedding = stored["model.embed_tokens.weight"]
    ends = 2 * (embedding if tied else sum(stored[n] for n in ENDS))
    ends *= 2 if tied else 1  # a tied tensor serves in both roles, each time
    norm = stored["model.norm.weight"]
    assert made.run["slots"] == 4  # all its layers
    assert made.run["bytes_read"] == layers + norm + ends + window_bytes(made, item=4)


ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def test_a_resumed_run_reads_only_what_it_still_needs(case: Case, tmp_path: Path) -> None:
    def notify(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("backward", 2):
            raise KeyboardInterrupt

    arguments = (str(case.teacher), str(case.student), case.seeds, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pkt.extract(*arguments, rank=RANK, io="buffered", notify=notify)
    made = pkt.extract(*arguments, rank=RANK, io="buffered")
    stored = sizes(case.teacher)
    left = sum(s for n, s in stored.items() if n.startswith(("model.layers.0.", "model.layers.1.")))
    norm = stored["model.norm.weight"]
    assert made.run["bytes_read"] == left + norm + window_bytes(made, item=2)


def test_the_run_record_tells_what_it_cost(case: Case) -> None:
    run = json.loads((case.extract().folder / "pkt_run.json").read_text())
    assert run["seconds"].keys() >= {"skeleton", "embed", "forward", "head", "backward", "factors",
                                     "write", "report"}  # fmt: skip
    assert run["peak_anonymous_bytes"] > 50 << 20
    assert run["stalls"] >= 0
    assert run["versions"].keys() == {"torch", "transformers", "peft"}
    assert run["host"]["memory_bytes"] > 1 << 30
