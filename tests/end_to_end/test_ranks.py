"""Several processes share the seeds: the scores of one, the same bytes each time, no one waits.

Ranks are forked from processes that have imported everything; torchrun starts the last ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import pkt
import runs
from pkt.api import prepare
from pkt.errors import OutputError, UsageError
from pkt.processes import balanced
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"rank": 4, "dtype": "float32", "select": "top-weights",
                           "embeddings": True}  # fmt: skip
RANKS = 3  # nurseries; most tests use two


class Ranks:
    """Runs `pkt.extract` in several processes that meet as torchrun's would."""

    def __init__(self, nurseries: Sequence[runs.Nursery]) -> None:
        self._nurseries = nurseries

    def start(self, *paths: Path, outs: Sequence[Path], **options: Any) -> list[int]:
        """One process for each of ``outs``; an option that is a list has a value for each."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        processes = []
        for rank, out in enumerate(outs):
            ours = {k: v[rank] if isinstance(v, list) else v for k, v in options.items()}
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank,
                   "WORLD_SIZE": len(outs)}  # fmt: skip
            env = {key: str(value) for key, value in env.items()}
            nursery = self._nurseries[rank]
            processes.append(nursery.start(*paths, out, env=env, processes=len(outs), **ours))
        return processes

    def finish(self, count: int = 2) -> list[tuple[int, str]]:
        return [nursery.finish() for nursery in self._nurseries[:count]]

    def run(self, *paths: Path, outs: Sequence[Path], **options: Any) -> list[tuple[int, str]]:
        self.start(*paths, outs=outs, **options)
        return self.finish(len(outs))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command line sets it
    with contextlib.ExitStack() as stack, mock.patch.dict(os.environ, quiet):
        yield Ranks([stack.enter_context(runs.Nursery()) for _ in range(RANKS)])


class Case:
    """One pair and its uninterrupted results in two processes and in one."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks, self.seconds = folder, ranks, 0.0
        teacher, student = build_pair(folder, "llama", "llama")
        self.paths = teacher, student, write_seeds(folder / "seeds.jsonl")
        for name in ("warm", "whole"):
            begun = time.monotonic()
            assert self.run(folder / name) == [(0, "")] * 2
            self.seconds = time.monotonic() - begun
        self.whole = runs.contents(folder / "whole")
        assert self.whole == runs.contents(folder / "warm")

    def run(self, *outs: Path, **options: Any) -> list[tuple[int, str]]:
        """Exit codes and, of a failure, its message."""
        outs = outs * 2 if len(outs) == 1 else outs
        found = self.ranks.run(*self.paths, outs=outs, **{**OPTIONS, **options})
        return [(code, text if code else "") for code, text in found]

    def stop(self, out: Path, reached: Callable[[], bool], **options: Any) -> None:
        """Kill both processes once ``reached``; the run may have ended before."""
        processes = self.ranks.start(*self.paths, outs=[out, out], **{**OPTIONS, **options})
        until = time.monotonic() + 60
        while not reached() and time.monotonic() < until:
            time.sleep(0.001)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.ranks.finish()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Case:
    return Case(tmp_path_factory.mktemp("ranks"), ranks)


def as_one(two: Path, one: Path) -> None:
    """Scores within 1e-5; a window is the same, or its sum is within 1e-6 of the other's."""
    ours, theirs = (json.loads((out / "pkt_manifest.json").read_text()) for out in (two, one))
    assert ours["loss"] == theirs["loss"]
    assert ours["layer_scores"] == pytest.approx(theirs["layer_scores"], rel=1e-5)
    assert ours["layers"] == theirs["layers"]
    assert ours["windows"].keys() == theirs["windows"].keys()
    for name, window in ours["windows"].items():
        assert window["score"] == pytest.approx(theirs["windows"][name]["score"], rel=1e-6)
    shared = ("format", "method", "teacher", "student", "seeds", "options")
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    sizes = [
        {
            name: tensor.shape
            for name, tensor in load_file(out / "adapter_model.safetensors").items()
        }
        for out in (two, one)
    ]
    assert sizes[0] == sizes[1]


PAIRS = {
    "llama": ("llama", {"select": "window", "embeddings": True}),
    "gemma2": ("gemma2", {"select": "rows-cols", "embeddings": True}),  # tied, soft caps
    "qwen2": ("qwen2", {"select": "consistent", "embeddings": True}),  # biases
    "gpt_neox": ("gpt_neox", {"select": "top-weights"}),  # fused projections
    "phi3": ("phi3", {"select": "random-window", "layers": "last"}),
    "qwen3": ("qwen3", {"select": "orthogonal"}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_find_what_one_does(name: str, tmp_path: Path, ranks: Ranks) -> None:
    family, chosen = PAIRS[name]
    options = {"rank": 4, "dtype": "float32", **chosen}
    paths = (*build_pair(tmp_path, family, family), write_seeds(tmp_path / "seeds.jsonl"))
    two, one = tmp_path / "two", tmp_path / "one"
    done = ranks.run(*paths, outs=[two, two], **options)
    assert [code for code, _ in done] == [0, 0], done
    pkt.extract(*map(str, paths), one, **options)
    as_one(two, one)
    assert not (two / ".work").exists()
    assert json.loads((two / "pkt_run.json").read_text())["processes"] == 2


def test_three_processes_too_and_twice_the_same(case: Case, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("three", "again")]
    for out in outs:
        assert case.run(out, out, out) == [(0, "")] * 3
    assert runs.contents(outs[0]) == runs.contents(outs[1])
    as_one(outs[0], case.folder / "whole")


def test_one_matrix_at_a_time_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """The budget may differ from host to host."""
    plans = [{"scores": "layer", "slots": 2}, {"scores": "matrix", "slots": 1}]
    assert case.run(tmp_path / "out", plan=plans) == [(0, "")] * 2
    assert runs.contents(tmp_path / "out") == case.whole


@pytest.mark.parametrize("moments", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(moments: int, case: Case, tmp_path: Path) -> None:
    draw, killed = random.Random(moments), 0
    for number in range(moments):
        out = tmp_path / f"{number}"
        processes = case.ranks.start(*case.paths, outs=[out, out], **OPTIONS)
        time.sleep(draw.uniform(0.1, 1.0) * case.seconds)
        draw.shuffle(processes)
        for process in processes:  # never at quite the same moment
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            time.sleep(draw.choice([0, 0, 0.003, 0.01]))
        codes = [code for code, _ in case.ranks.finish()]
        killed += any(codes)
        assert case.run(out) == [(0, "")] * 2
        assert runs.contents(out) == case.whole
        assert not (out / ".work").exists()
    assert killed >= moments // 2


def remove_spool(spool: Path) -> None:
    shutil.rmtree(spool)


def remove_records(spool: Path) -> None:
    for path in spool.glob("layer-*.json"):
        path.unlink()


def halve_gradients(spool: Path) -> None:
    for path in spool.glob("upstream-*.bin"):
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", [remove_spool, remove_records, halve_gradients],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_processes_continue_where_the_last_of_them_stands(
    damage: Callable[[Path], None], rank: int, case: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spool = out / ".work" / "spool"
    case.stop(out, lambda: len([*spool.glob("rank-*/layer-*.json")]) >= 3)
    damage(spool / f"rank-{rank}")
    assert case.run(out) == [(0, "")] * 2
    assert runs.contents(out) == case.whole


def test_each_host_may_have_a_disk_of_its_own(case: Case, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert case.run(here, there) == [(0, "")] * 2
    assert runs.contents(here) == case.whole
    assert not there.exists(), "the other host keeps nothing"
    assert case.run(here, there) == [(0, "")] * 2, "finished already"
    assert not there.exists()


def test_each_process_has_a_part_of_its_own_in_a_spool_elsewhere(
    case: Case, tmp_path: Path
) -> None:
    """One process loses its part, and k is not the same for all: each host's disk decides."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    spool = out / ".work" / "spool"
    case.stop(
        out, lambda: len([*spool.glob("rank-*/layer-*.json")]) >= 3,
        spool_dir=str(scratch), spool_every=3,
    )  # fmt: skip
    assert not [*spool.rglob("*.bin")]
    owners = {
        json.loads((folder / "owner.json").read_text())["spool"]: folder
        for folder in scratch.iterdir()
    }
    assert owners.keys() == {str(spool / "rank-0"), str(spool / "rank-1")}
    shutil.rmtree(owners[str(spool / "rank-1")])
    assert case.run(out, spool_dir=str(scratch), spool_every=[2, 3]) == [(0, "")] * 2
    assert runs.contents(out) == case.whole
    assert list(scratch.iterdir()) == []


def test_a_host_plans_the_disk_of_its_processes(case: Case) -> None:
    plans = [
        prepare(*map(str, case.paths), **OPTIONS, spool_every=1, processes=2, processes_here=here)
        for here in (1, 2)
    ]
    one, both = (task.plan.spool_bytes for task in plans)
    assert both == prepare(*map(str, case.paths), **OPTIONS, spool_every=1).plan.spool_bytes
    lengths = [len(sample.tokens) for sample in plans[0].seeds.samples]
    larger = max(sum(lengths[item] for item in part) for part in balanced(lengths, 2))
    assert larger > sum(lengths) / 2, "the seeds do not divide evenly"
    assert one / both == pytest.approx(larger / sum(lengths))


def test_a_spool_of_another_run_is_not_used(case: Case, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    processes = case.ranks.start(*case.paths, outs=[here, there], **{**OPTIONS, "seed": 7})
    while not [*there.glob(".work/spool/rank-1/input-*.sum.json")]:
        time.sleep(0.001)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    case.ranks.finish()
    shutil.rmtree(here)
    assert case.run(here, there) == [(0, "")] * 2
    assert runs.contents(here) == case.whole


def test_another_number_of_processes_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    case.stop(out, lambda: bool([*out.glob(".work/spool/rank-0/layer-*.json")]))
    with pytest.raises(OutputError, match=r"with other inputs .* changed: processes"):
        pkt.extract(*map(str, case.paths), out, **OPTIONS)
    found = case.run(out, out, out)
    assert found[0][0] == 1
    assert found[0][1].endswith("changed: processes")
    assert {code for code, _ in found} == {1}
    pkt.extract(*map(str, case.paths), out, **OPTIONS, overwrite=True)
    as_one(case.folder / "whole", out)


def test_a_finished_run_is_returned_whatever_the_number(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.folder / "whole", out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert case.run(out, out, out) == [(0, "")] * 3
    pkt.extract(*map(str, case.paths), out, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_other_inputs_on_another_host_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    found = case.run(tmp_path / "out", rank=[4, 5])
    assert found[1] == (2, "process 1 has other inputs than process 0: options.rank")
    assert found[0][0] == 1
    assert "process 1 (of 0 to 1) has ended with an error, which it prints itself" in found[0][1]


def test_a_process_that_dies_ends_the_others_with_one_line(case: Case, tmp_path: Path) -> None:
    for victim in (0, 1):
        out = tmp_path / f"{victim}"
        processes = case.ranks.start(*case.paths, outs=[out, out], **OPTIONS)
        while not (out / ".work" / "spool" / f"rank-{victim}" / "input-00001.bin").exists():
            time.sleep(0.001)
        os.kill(processes[victim], signal.SIGKILL)
        found = case.ranks.finish()
        assert found[victim][0] == -signal.SIGKILL
        code, text = found[1 - victim]
        assert code == 1
        assert text.startswith("another of the 2 processes has ended or cannot be reached: ")
        assert "\n" not in text
        assert case.run(out) == [(0, "")] * 2
        assert runs.contents(out) == case.whole


def test_more_processes_than_seeds(case: Case) -> None:
    with pytest.raises(UsageError, match="5 seeds for 6 processes: expected a seed for each"):
        prepare(*map(str, case.paths), **OPTIONS, processes=6)


def test_a_host_shares_its_memory_among_its_processes(case: Case) -> None:
    alone, shared = (
        prepare(*map(str, case.paths), **OPTIONS, processes=5, processes_here=here).plan
        for here in (1, 4)
    )
    assert shared.budget_bytes == pytest.approx(alone.budget_bytes / 4, rel=0.2)
    assert shared.budget_source.endswith(", shared by 4 processes")
    given = prepare(*map(str, case.paths), **OPTIONS, max_ram="3GiB", processes_here=4).plan
    assert given.budget_bytes == 3 << 30


def torchrun(*words: object) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", 2, "-m", "pkt", *words]  # fmt: skip
    return [str(word) for word in command]


def test_torchrun_killed_and_started_again(case: Case, tmp_path: Path) -> None:
    """One process speaks; what is lost costs nothing but time."""
    teacher, student, seeds = case.paths
    out = tmp_path / "out"
    words = ["extract", "--teacher", teacher, "--student", student, "--seeds", seeds, "--rank", 4,
             "--dtype", "float32", "--select", "top-weights", "--embeddings"]  # fmt: skip
    begun = subprocess.Popen(
        torchrun(*words, "-o", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lock = out / ".work" / "spool" / "rank-1" / "lock"
    while not (out / ".work" / "spool" / "rank-1" / "input-00000.bin").exists():
        assert begun.poll() is None
        time.sleep(0.001)
    os.kill(int(lock.read_text().split()[-1]), signal.SIGKILL)
    printed, said = begun.communicate(timeout=100)
    assert begun.returncode
    assert not printed
    ours = [line for line in said.splitlines() if line.startswith("pkt: error: ")]
    assert len(ours) == 1, said
    assert ours[0].startswith("pkt: error: process 0: ")
    done = subprocess.run(torchrun(*words, "-o", out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)]
    assert done.stderr.count("forward  4/4 layers") <= 1
    assert "processes: 2 share the seeds" in done.stderr
    assert (out / "report" / "spectra.png").is_file()
    undrawn = {name for name in case.whole if not name.startswith("report")}
    found = runs.contents(out)
    assert {name: found.get(name) for name in undrawn} == {n: case.whole[n] for n in undrawn}


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_host_that_fails_before_they_meet(failing: int, case: Case, tmp_path: Path) -> None:
    """As two hosts' processes: the other one ends too, and says why."""
    teacher, student, seeds = case.paths
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for rank in range(2):
        large = tmp_path / "nothing" if rank == failing else teacher
        words = [
            "--teacher",
            large,
            "--student",
            student,
            "--seeds",
            seeds,
            "-o",
            tmp_path / f"{rank}",
        ]
        env = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1", "RANK": str(rank), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "pkt", "extract", *map(str, words), "-q"]
        begun.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=100)[1] for process in begun]
    assert begun[failing].returncode == 2
    assert "no such folder" in said[failing]
    other = 1 - failing
    assert begun[other].returncode == 1
    assert f"pkt: error: process {other}: " in said[other]
    assert "Traceback" not in said[other]
