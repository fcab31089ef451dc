"""`pkt eval` on a tiny student, adapters on it and a teacher, over files of every task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from commands import Result, pkt, result_bytes, write_seeds
from pkt.evaluation import harness
from pkt.evaluation.formats import read_benchmark
from pkt.evaluation.tasks import local_tasks, parse_tasks

VOCABULARY = 320
TASKS = "loss,mmlu@1,gsm8k@1,superni,alpacafarm,humaneval,mbpp"
SMALL = ("--limit", 2, "--max-new-tokens", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders student, teacher, and lora/good and other/good: adapters of the student."""
    folder = tmp_path_factory.mktemp("models")
    positions = {"max_position_embeddings": 2048}
    tiny.build("llama", folder / "student", "student", vocab=VOCABULARY, seed=1, **positions)
    tiny.build("llama", folder / "teacher", "teacher", vocab=VOCABULARY, **positions)
    for name in ("student", "teacher"):
        tiny.write_tokenizer(folder / name, VOCABULARY)
    _adapter(folder / "student", folder / "lora/good")
    _adapter(folder / "student", folder / "other/good", modules_to_save=["lm_head"], seed=1)
    return folder


def _adapter(student: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    modules = ["q_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, **options)
    model = get_peft_model(base, config)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.weight.mul_(0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    problems = [
        {"question": f"{i} and {i}?", "answer": f"It is {2 * i}\n#### {2 * i}"} for i in range(4)
    ]
    for part in ("loss", "gsm8k/test", "gsm8k/train"):
        path = folder / f"{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_seeds(path, problems)
    for part in ("test", "dev"):
        (folder / "mmlu" / part).mkdir(parents=True)
        for subject in ("anatomy", "us_foreign_policy"):
            rows = "".join(f"tag {i}?,red,big,dog,kid,{'ABCD'[i]}\n" for i in range(3))
            (folder / f"mmlu/{part}/{subject}_{part}.csv").write_text(rows)
    task = {
        "Definition": ["Say it again."],
        "Positive Examples": [{"input": "a", "output": "a"}, {"input": "b", "output": "b"}],
        "Instances": [{"input": f"tag {i}", "output": [f"tag {i}"]} for i in range(3)],
    }
    (folder / "superni").mkdir()
    (folder / "superni/task001_again.json").write_text(json.dumps(task))
    farm = [{"instruction": f"tag {i}", "input": "big" * i} for i in range(3)]
    (folder / "alpaca_farm_evaluation.json").write_text(json.dumps(farm))
    code = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "entry_point": f"f{i}",
         "test": "def check(f):\n    assert f() == 1\n"}
        for i in range(3)
    ]  # fmt: skip
    write_seeds(folder / "HumanEval.jsonl", code)
    mbpp = [{"task_id": i, "text": "Add.", "test_list": ["assert True"] * 3} for i in range(11, 14)]
    write_seeds(folder / "mbpp.jsonl", mbpp)
    return folder


def _loss(out: Path) -> dict[str, float]:
    results = json.loads((out / "results.json").read_text())
    (row,) = [row for row in results["rows"] if row["metric"] == "loss"]
    return {column: value["value"] for column, value in row["values"].items()}


def test_every_task_from_local_files(models: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "eval", "--model", models / "student", "--adapter", models / "lora/good",
        "--adapter", models / "other/good", "--teacher", models / "teacher",
        "--tasks", TASKS, "--data", data, "-o", out, *SMALL,
    ]  # fmt: skip
    made = pkt(*arguments)
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1] == str(out)
    assert "it/s" not in made.err  # lm-eval's bars
    results = json.loads((out / "results.json").read_text())
    columns = ["student", "good", "good-2", "teacher"]
    assert results["columns"] == columns
    rows = {(row["task"], row["metric"]): row for row in results["rows"]}
    expected = {
        ("loss", "loss"), ("loss", "perplexity"), ("loss", "KL from teacher"),
        ("loss", "top-1 agreement"), ("mmlu@1", "acc"), ("gsm8k@1", "exact_match,strict-match"),
        ("gsm8k@1", "exact_match,flexible-extract"), ("superni", "exact_match"),
        ("superni", "rougeL"), ("alpacafarm", "answered"), ("humaneval", "answered"),
        ("mbpp", "answered"),
    }  # fmt: skip
    assert rows.keys() == expected
    assert all(list(row["values"]) == columns for row in results["rows"])
    loss = rows["loss", "loss"]
    assert len({value["value"] for value in loss["values"].values()}) == 4
    share = loss["gap_closed"]["good"]
    values = {column: value["value"] for column, value in loss["values"].items()}
    assert share == pytest.approx(
        (values["student"] - values["good"]) / (values["student"] - values["teacher"])
    )
    assert rows["mmlu@1", "acc"]["values"]["student"]["count"] == 4  # 2 of each subject
    assert set(results["parts"]["mmlu@1"]["student"]) == {"mmlu_anatomy", "mmlu_us_foreign_policy"}
    assert any("--allow-code-exec" in note for note in results["notes"])
    for task in TASKS.split(","):
        for column in columns:
            lines = (out / f"details/{task}/{column}.jsonl").read_text().splitlines()
            assert lines
            assert all(json.loads(line) for line in lines)
    answers = json.loads((out / "details/alpacafarm/student.jsonl").read_text().splitlines()[1])
    assert answers["prompt"] == "<|user|>\ntag 1\n\nbig\n\n<|assistant|>\n"
    assert isinstance(answers["generation"], str)
    manifest = (out / "pkt_manifest.json").read_text()
    assert str(models) not in manifest
    assert str(data) not in manifest

    before = result_bytes(out)
    again = pkt(*arguments)
    assert again.code == 0
    assert again.err == ""  # nothing is evaluated
    assert result_bytes(out) == before


def test_losses_are_those_of_each_model_alone(models: Path, data: Path, tmp_path: Path) -> None:
    """An adapter that replaces the head must not leave it to the next column."""
    common = ("--model", models / "student", "--tasks", "loss", "--data", data, "--device", "cpu")
    order = ["lora/good", "other/good"]
    losses = {}
    for number, adapters in enumerate(([], order, order[::-1])):
        named = [word for name in adapters for word in ("--adapter", models / name)]
        out = tmp_path / str(number)
        assert pkt("eval", *common, *named, "-o", out).code == 0
        losses[number] = _loss(out)
    assert losses[1]["student"] == losses[2]["student"] == losses[0]["student"]
    assert losses[1]["good"] == losses[2]["good-2"]  # the columns change their names with the order
    assert losses[1]["good-2"] == losses[2]["good"]
    assert len(set(losses[1].values())) == 3


def test_programs_run_only_when_it_is_allowed(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = pytest.importorskip("pkt.sandbox")
    try:
        sandbox.isolation()
    except Exception as error:
        pytest.skip(f"no isolation here: {error}")
    answers = iter(["    return 1", "    return 2"])
    original = harness.run_tasks

    def answered(*given: Any, **options: Any) -> Any:
        """The tiny model's own run, its answers replaced by one that passes and one that fails."""
        found = original(*given, **options)
        for row in found.rows:
            row["answer"] = next(answers)
        return found

    monkeypatch.setattr("pkt.methods.evaluating.run_tasks", answered)
    out = tmp_path / "out"
    made = pkt(
        "eval", "--model", models / "student", "--tasks", "humaneval", "--data", data, "-o", out,
        "--allow-code-exec", *SMALL,
    )  # fmt: skip
    assert made.code == 0, made.err
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert (row["metric"], row["values"]["student"]["value"]) == ("pass@1", 0.5)
    lines = (out / "details/humaneval/student.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [True, False]


def test_an_interrupted_evaluation_continues(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    common = (
        "eval", "--model", models / "student", "--teacher", models / "teacher",
        "--tasks", "loss,gsm8k@0", "--data", data, *SMALL,
    )  # fmt: skip
    assert pkt(*common, "-o", whole).code == 0
    original, calls = harness.run_tasks, []

    def fails_second(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return original(*given, **options)

    monkeypatch.setattr("pkt.methods.evaluating.run_tasks", fails_second)
    assert pkt(*common, "-o", out).code == 1
    assert len(list((out / ".work/steps").glob("*.json"))) == 3  # both of the student, one loss
    continued = pkt(*common, "-o", out)
    assert continued.code == 0, continued.err
    assert len(calls) == 3  # the student's task is not asked again
    assert "student: loss" not in continued.err
    assert result_bytes(out) == result_bytes(whole)


def test_json_config_and_quiet(models: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    lines = (f"model: {models / 'student'}", "tasks: [loss]", f"data: ['{data}']", "device: cpu")
    config.write_text("\n".join(lines))
    made = pkt("eval", "--config", config, "-o", tmp_path / "out", "--json", "-q")
    assert (made.code, made.err) == (0, "")
    found = json.loads(made.out)
    assert found["results"]["rows"][0]["task"] == "loss"
    assert found["manifest"]["method"] == "eval"


def _fails(code: int, message: str, *arguments: object) -> Result:
    made = pkt("eval", *arguments)
    assert made.code == code, made.err
    assert message in made.error
    return made


def test_what_cannot_be_evaluated_is_one_line(models: Path, data: Path, tmp_path: Path) -> None:
    student, out = models / "student", tmp_path / "out"
    base = ("--model", student, "--data", data, "-o", out, "--device", "cpu")
    loss = (*base, "--tasks", "loss")
    _fails(2, "pkt eval also needs --tasks", *base)
    made = _fails(2, "unknown task", *base, "--tasks", "gsm9k")
    assert "gsm8k" in made.hint
    _fails(2, "no such folder", *loss, "--adapter", tmp_path / "none")
    start = _adapter(student, tmp_path / "start")
    (start / "pkt_manifest.json").write_text('{"method": "seeking"}')
    made = _fails(3, "found an extracted start", *loss, "--adapter", start)
    assert "train" in made.hint
    other = _adapter(models / "teacher", tmp_path / "large")
    _fails(3, "expected 56 in features, found 80", *loss, "--adapter", other)
    deep = tiny.build("llama", tmp_path / "deep", "student", vocab=VOCABULARY, layers=4)
    _fails(3, "has a layer 3", *loss, "--adapter", _adapter(deep, tmp_path / "deeper"))
    flat = tiny.build("llama", tmp_path / "flat", "student", vocab=VOCABULARY, layers=2)
    _fails(3, "missing key", *loss, "--adapter", _adapter(flat, tmp_path / "flatter"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (pickled / "adapter_model.bin").write_bytes(b"")
    _fails(1, "found a pickled one", *loss, "--adapter", pickled)
    made = _fails(4, "this evaluation holds", *loss, "--max-ram", "100MiB")
    assert "the smallest setting that fits is --max-ram" in made.hint
    _fails(5, "expected lines of", "--model", student, "--data", tmp_path, "-o", out, "--tasks",
           "humaneval")  # fmt: skip
    bad = write_seeds(tmp_path / "bad.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])
    _fails(5, f"{bad}:2: missing column 'answer'", *base, "--tasks", "gsm8k@0", "--data",
           f"gsm8k={bad}")  # fmt: skip
    _fails(2, "expected 9 solved examples, found 4", *base, "--tasks", "gsm8k@9")
    _fails(2, "needs --data", "--model", student, "--tasks", "loss", "-o", out)
    _fails(2, "outside a sandbox", "--model", student, "--tasks", "humaneval", "-o", out)
    assert not out.exists()


def test_a_teacher_of_other_tokens_is_refused_for_the_loss(
    models: Path, data: Path, tmp_path: Path
) -> None:
    teacher = tiny.build("llama", tmp_path / "teacher", "teacher", vocab=VOCABULARY)
    tiny.write_tokenizer(teacher, 200)
    base = ("--model", models / "student", "--teacher", teacher, "--data", data, *SMALL)
    differ = "entries of the two tokenizers differ"
    _fails(3, differ, *base, "--tasks", "loss", "-o", tmp_path / "a")
    made = pkt("eval", *base, "--tasks", "gsm8k@0", "-o", tmp_path / "b")
    assert made.code == 0, made.err


def test_loss_needs_no_lm_eval(models: Path, data: Path, tmp_path: Path) -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lm_eval", "rouge_score", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from pkt.cli import main
sys.exit(main(sys.argv[1:]))
"""
    base = ["eval", "--model", str(models / "student"), "--data", str(data), "--device", "cpu"]

    def run(task: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", code, *base, "--tasks", task, "-o", str(tmp_path / task)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert run("loss").returncode == 0
    missing = run("gsm8k")
    assert missing.returncode == 2
    assert "pip install 'pkt-llm[eval]'" in missing.stderr


def test_local_files_never_ask_the_network(models: Path, data: Path, tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*given):
    raise AssertionError(f"a connection to {given}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from pkt.cli import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["eval", "--model", models / "student", "--adapter", models / "lora/good", "--data",
             data, "--tasks", TASKS, "-o", tmp_path / "out", *SMALL]  # fmt: skip
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    made = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment | {"HF_HOME": str(tmp_path / "hub")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_lm_evals_own_task_says_the_same(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --data the name is lm-eval's, its documents from the hub: here from the same file."""
    problems = [json.loads(line) for line in (data / "gsm8k/test.jsonl").read_text().splitlines()]
    documents = DatasetDict(dict.fromkeys(("test", "train"), Dataset.from_list(problems)))
    base = ("eval", "--model", models / "student", "--tasks", "gsm8k@2", "--limit", 3)
    made = pkt(*base, "--max-new-tokens", 8, "-o", tmp_path / "hub")
    assert made.code == 5
    assert "task 'gsm8k': lm-eval could not get its documents" in made.error
    monkeypatch.setattr("datasets.load_dataset", lambda **_: documents)
    made = pkt(*base, "--max-new-tokens", 8, "-o", tmp_path / "hub")
    assert made.code == 0, made.err
    assert pkt(*base, "--max-new-tokens", 8, "--data", data, "-o", tmp_path / "local").code == 0
    ours, stock = (
        (tmp_path / name / "details/gsm8k@2/student.jsonl").read_text() for name in ("local", "hub")
    )
    assert ours == stock
    assert len(ours.splitlines()) == 6  # two filters


def test_the_formats_are_written_down() -> None:
    made = pkt("eval", "--data-help")
    assert made.code == 0
    for name in ("HumanEval.jsonl.gz", "sanitized-mbpp.json", "alpaca_farm_evaluation.json"):
        assert name in made.out


def test_a_short_model_leaves_a_task_as_it_was(data: Path, tmp_path: Path) -> None:
    """gsm8k's 256 new tokens do not fit 256 positions: half of them, for this model alone."""
    folder = tiny.build("llama", tmp_path / "short", "student", vocab=VOCABULARY)
    tiny.write_tokenizer(folder, VOCABULARY)
    (asked,) = parse_tasks(["gsm8k@0"])
    tasks = local_tasks(asked, read_benchmark("gsm8k", data), limit=1)
    before = dict(tasks["gsm8k"].get_config("generation_kwargs"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = harness.run_tasks(model, tokenizer, tasks)
    assert {row["doc_id"] for row in found.rows} == {0}
    assert len(tokenizer(found.rows[0]["generation"])["input_ids"]) > 4
    assert tasks["gsm8k"].get_config("generation_kwargs") == before
