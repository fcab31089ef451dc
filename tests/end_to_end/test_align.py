"""`pkt align`, whole: targets, then training, as a user meets them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pkt as package
from commands import Inputs, Result, build_inputs, pkt, write_seeds
from pkt.api import prepare_align
from pkt.errors import CheckpointError
from pkt.samples import read_samples
from pkt.similarity import linear_cka
from pkt.targets import FOLDER, Targets
from runs import Nursery, contents

QUICK = ("--max-steps", 4, "--batch-size", 4, "--micro-batch", 2, "--lr", "1e-2", "-q")


class Bench:
    """A pair and its data."""

    def __init__(self, folder: Path) -> None:
        self.inputs: Inputs = build_inputs(folder)
        rows = [
            {"question": f"is tag {i} big", "answer": f"dog and kid {i * i}"} for i in range(12)
        ]
        self.data = write_seeds(folder / "data.jsonl", rows)

    def words(self, out: Path, *more: object, **replaced: object) -> tuple[object, ...]:
        given = {
            "teacher": self.inputs.teacher, "student": self.inputs.student, "data": self.data,
        } | replaced  # fmt: skip
        words = [w for name, value in given.items() for w in (f"--{name}", value)]
        return ("align", *words, "-o", out, *QUICK, *more)

    def align(self, out: Path, *more: object, **replaced: object) -> Result:
        return pkt(*self.words(out, *more, **replaced))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("align"))


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "pkt_manifest.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("objective", ["v1", "v2", "acl", "hidden-mse"])
def test_an_adapter_of_the_paired_layers(bench: Bench, tmp_path: Path, objective: str) -> None:
    out = tmp_path / "out"
    made = bench.align(out, "--objective", objective)
    assert made.code == 0, made.err
    assert made.out.strip() == str(out)
    held = Targets(tmp_path / "out.targets" / FOLDER)
    paired = {pair.student for pair in held.pairs}
    assert len(paired) == (1 if objective == "v1" else len(paired))
    adapter = load_file(out / "adapter_model.safetensors")
    layers = {int(name.split(".layers.")[1].split(".")[0]) + 1 for name in adapter}
    assert layers == paired
    moved = {
        int(name.split(".layers.")[1].split(".")[0]) + 1
        for name, weight in adapter.items()
        if "lora_B" in name and bool(weight.any())
    }
    assert moved == paired
    kinds = {name.split(".layers.")[1].split(".")[2] for name in adapter}
    assert kinds == {"up_proj", "down_proj", "v_proj", "o_proj"}
    assert manifest(out)["options"]["objective"] == objective


def hidden_states(folder: Path, adapter: Path | None, samples: Any, places: Any) -> Any:
    """By layer the states (n, D) before the answer tokens at ``places``, whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    found: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    seen: list[torch.Tensor] = []
    for layer in (model.base_model.model if adapter else model).model.layers:
        layer.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    for example, token in places:
        sample = samples[example]
        at = [i for i, counts in enumerate(sample.loss_mask) if counts][token] - 1
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([sample.tokens]), use_cache=False)
        for held, states in zip(found, seen, strict=True):
            held.append(states.reshape(-1, states.shape[-1])[at])
    return [torch.stack(held) for held in found]


def test_layers_are_compared_before_and_after(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--dtype", "float32", "--pairs", "2:1,4:2", "--lr", "3e-2")
    assert bench.align(out, *words).code == 0
    found, index = manifest(out), tmp_path / "out.targets" / FOLDER / "index.json"
    places = json.loads(index.read_text())["kernels"]["places"]
    samples = read_samples(
        bench.data, AutoTokenizer.from_pretrained(bench.inputs.student),
        template=found["options"]["template"], limit=0,
    ).samples  # fmt: skip
    assert len(places) == found["similarity"]["positions"] == min(256, found["data"]["loss_tokens"])
    theirs = hidden_states(bench.inputs.teacher, None, samples, places)
    moved = 0.0
    for name, adapter in (("before", None), ("after", out)):
        ours = hidden_states(bench.inputs.student, adapter, samples, places)
        wanted = torch.tensor(linear_cka(theirs, ours))
        assert torch.allclose(torch.tensor(found["similarity"][name]), wanted, atol=2e-4)
        moved = max(
            moved, float((wanted - torch.tensor(found["similarity"]["before"])).abs().max())
        )
    assert moved > 1e-3
    pictures = sorted(path.name for path in (out / "report").glob("similarity_*.png"))
    assert pictures == [f"similarity_{name}.png" for name in ("after", "before", "change")]
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert f"{found['similarity']['after'][3][1]:.3f}" in page
    kernel = tmp_path / "out.targets" / FOLDER / "kernel-00001.safetensors"
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"kernel-00001\.safetensors"):
        Targets(tmp_path / "out.targets" / FOLDER)


def test_v1_pairs_its_critical_layer_and_every_layer_if_asked(bench: Bench) -> None:
    pair = str(bench.inputs.teacher), str(bench.inputs.student)
    one = prepare_align(*pair, bench.data)
    assert (one.targets.states.critical, one.targets.states.pairs) == (1, None)
    every = prepare_align(*pair, bench.data, states={"critical": 0})
    assert every.targets.states.critical == 0
    assert [layers.student for layers in every.targets.states.pairs] == [1, 2, 3]


def test_targets_without_kernels_are_learned_from_without_comparing_layers(
    bench: Bench, tmp_path: Path
) -> None:
    """As written before there were any, or for fewer answer tokens than a comparison takes."""
    pair, said = (bench.inputs.teacher, bench.inputs.student), tmp_path / "said"
    package.write_targets(*map(str, pair), bench.data, said, states=True, interface="hidden")
    index = said / FOLDER / "index.json"
    found = json.loads(index.read_text())
    del found["kernels"]
    index.write_text(json.dumps(found))
    for path in (said / FOLDER).glob("kernel-*"):
        path.unlink()
    made = package.train(
        str(pair[1]), bench.data, tmp_path / "out", objective="v1", teacher_targets=said,
        max_steps=2, batch_size=4, micro_batch=2,
    )  # fmt: skip
    assert "similarity" not in made.manifest
    assert not list((tmp_path / "out" / "report").glob("similarity*"))


def test_it_is_targets_and_then_training(bench: Bench, tmp_path: Path) -> None:
    assert bench.align(tmp_path / "one", "--objective", "v2").code == 0
    package.write_targets(
        str(bench.inputs.teacher), str(bench.inputs.student), bench.data, tmp_path / "said",
        states=True, interface="span", map="dual", pair_by="attribution",
    )  # fmt: skip
    package.train(
        str(bench.inputs.student), bench.data, tmp_path / "two", objective="v2",
        teacher_targets=tmp_path / "said", max_steps=4, batch_size=4, micro_batch=2, lr=1e-2,
    )  # fmt: skip
    assert contents(tmp_path / "one.targets") == contents(tmp_path / "said")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_targets_serve_again(bench: Bench, tmp_path: Path) -> None:
    said = tmp_path / "said"
    words = ("--teacher-targets", said, "--pairs", "4:2")
    assert bench.align(tmp_path / "a", *words).code == 0
    written = {path: path.stat().st_mtime_ns for path in said.rglob("*")}
    more = ("--output-loss", "ce", "--rank", 4, "--targets", "q,gate")
    again = bench.align(tmp_path / "b", *words, *more)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in said.rglob("*")} == written
    assert manifest(tmp_path / "b")["options"]["output_loss"] == "ce"


@pytest.mark.slow  # targets and training are killed apart in other tests
def test_killed_at_any_moment_and_continued(bench: Bench, tmp_path: Path) -> None:
    options = {
        "objective": "acl", "max_steps": 8, "batch_size": 4, "micro_batch": 2, "lr": 1e-2,
        "save_steps": 1,
    }  # fmt: skip
    paths = (bench.inputs.teacher, bench.inputs.student, bench.data)
    moments, out = random.Random(0), tmp_path / "out"
    with Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="align", **options)
        assert code == 0, text
        length, kills = time.monotonic() - began, 0
        while not (out / "pkt_manifest.json").exists():
            process = nursery.start(*paths, out, call="align", **options)
            if kills < 4:
                time.sleep(moments.uniform(0.1, 0.7) * length)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code, text = nursery.finish()
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), text
    assert kills
    assert contents(out) == contents(tmp_path / "whole")
    assert contents(tmp_path / "out.targets") == contents(tmp_path / "whole.targets")


def test_what_it_says_before_and_after(bench: Bench, tmp_path: Path) -> None:
    planned = bench.align(tmp_path / "out", "--dry-run", "--objective", "v2")
    assert planned.code == 0, planned.err
    assert "by attribution" in planned.out
    assert not (tmp_path / "out").exists()
    words = [w for w in bench.words(tmp_path / "out") if w != "-q"]
    made = pkt(*words)
    assert made.code == 0, made.err
    assert "v1 from mlp through cosine, beside it the output's cosine" in made.err
    assert "teacher layer" in made.err
    again = pkt(*words)
    assert again.err.count("finished already") == 2


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--objective", "v2", "--output-loss", "ce"], 2, "--output-loss ce"),
        (["--objective", "acl", "--interface", "mlp"], 2, "--interface mlp"),
        (["--objective", "v2", "--critical", 1], 2, "--critical"),
        (["--objective", "v2", "--max-steps", 1], 2, "a step or more for each"),
        (["--kl-weight", 2], 2, "--kl-weight"),
        (["--pairs", "9:1"], 2, "teacher layer 9"),
        (["--targets-only", "--epochs", 2], 2, "not used with --targets-only"),
        (["--rank", 4, "--dropout", 0, "--init", "nowhere"], 2, "nowhere"),
        (["--max-ram", "1MiB"], 4, "max-ram"),
    ],
)
def test_refused_before_the_teacher_is_read(
    bench: Bench, tmp_path: Path, words: list[object], code: int, text: str
) -> None:
    refused = bench.align(tmp_path / "out", *words)
    assert refused.code == code, refused.err
    assert text in refused.error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.targets").exists()


def test_changed_data_loses_nothing(bench: Bench, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(bench.data, data)
    assert bench.align(tmp_path / "out", data=data).code == 0
    before = contents(tmp_path / "out.targets")
    data.write_text(data.read_text(encoding="utf-8").replace("dog", "cat"), encoding="utf-8")
    refused = bench.align(tmp_path / "out", data=data)
    assert refused.code == 1
    assert "--overwrite" in refused.err
    assert contents(tmp_path / "out.targets") == before
