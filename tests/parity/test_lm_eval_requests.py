"""pkt's task files ask models what the stock task files of lm-eval ask, on the same documents."""

from __future__ import annotations

import gzip
import json
import random
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

from datasets import Dataset, DatasetDict  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

from pkt.evaluation.formats import read_benchmark  # noqa: E402
from pkt.evaluation.scoring import program  # noqa: E402
from pkt.evaluation.tasks import local_tasks, parse_tasks  # noqa: E402

STOCK = Path(lm_eval.__file__).parent / "tasks"
SUBJECTS = ("abstract_algebra", "high_school_us_history", "us_foreign_policy")


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """humaneval's and mbpp's utils fetch a metric when they are imported: not here."""
    metric = SimpleNamespace(compute=lambda **_: ({"pass@1": 0.0},))
    monkeypatch.setattr("evaluate.load", lambda *_: metric)


def _stock(path: str, splits: dict[str, list[dict[str, Any]]], shots: int | None) -> Any:
    """A stock task file as lm-eval loads it, its documents replaced, as `simple_evaluate` does."""
    config = import_module("lm_eval.tasks._yaml_loader").load_yaml(STOCK / path)
    for key in ("dataset_path", "dataset_name", "tag", "group"):
        config.pop(key, None)
    documents = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: documents})
    if shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    return task


def _requests(task: Any, limit: int | None = None) -> list[Any]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [(i.request_type, i.args, i.doc_id, i.idx, i.repeats) for i in task.instances]


def _ours(label: str, data: Path, limit: int = 0) -> dict[str, Any]:
    (asked,) = parse_tasks([label])
    return local_tasks(asked, read_benchmark(asked.name, data), limit=limit)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return rows


def _problems(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    pairs = [(draw.randint(2, 999), draw.randint(2, 999)) for _ in range(count)]
    return [
        {
            "question": f"Ann has {a} pears, é, and gets ${b} — how many?\nSay so.",
            "answer": f"She has {a}+{b} = <<{a}+{b}={a + b}>>{a + b:,}.\n#### {a + b:,}",
        }
        for a, b in pairs
    ]


@pytest.mark.parametrize("shots", [0, 5, 8])
def test_against_gsm8k(tmp_path: Path, shots: int) -> None:
    test = _jsonl(tmp_path / "test.jsonl", _problems(6, 0))
    train = _jsonl(tmp_path / "train.jsonl", _problems(30, 1))
    stock = _stock("gsm8k/gsm8k.yaml", {"train": train, "test": test}, shots)
    (ours,) = _ours(f"gsm8k@{shots}", tmp_path).values()
    assert _requests(ours) == _requests(stock)
    assert _requests(ours)[0][1][0].count("Question: ") == shots + 1


@pytest.mark.parametrize("shots", [0, 8])
def test_against_gsm8k_cot(tmp_path: Path, shots: int) -> None:
    test = _jsonl(tmp_path / "test.jsonl", _problems(3, 0))
    stock = _stock("gsm8k/gsm8k-cot.yaml", {"test": test}, shots)
    (ours,) = _ours(f"gsm8k_cot@{shots}", tmp_path).values()
    assert _requests(ours) == _requests(stock)


@pytest.mark.parametrize("stem", ["gsm8k", "gsm8k_cot"])
def test_answers_score_as_in_the_stock_task(tmp_path: Path, stem: str) -> None:
    test = _jsonl(tmp_path / "test.jsonl", _problems(6, 0))
    _jsonl(tmp_path / "train.jsonl", _problems(9, 1))
    stock = _stock(f"gsm8k/{stem.replace('_', '-')}.yaml", {"train": test, "test": test}, None)
    (ours,) = _ours(stem, tmp_path).values()
    right = [row["answer"].split("#### ")[1] for row in test]
    said = [
        f"so 12 and then #### {right[0]}",
        f"The answer is {right[1]}.",
        f"It is ${right[2].replace(',', '')}.00 or {right[2]}",
        "no number",
        f"#### {right[4]}.",
        "#### -1\nThe answer is -1.",
    ]
    scored = []
    for task in (stock, ours):
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for instance, text in zip(task.instances, said, strict=True):
            instance.resps.append(text)
        task.apply_filters()
        scored.append(
            [
                (key, task.process_results(i.doc, [i.filtered_resps[key]]))
                for i in task.instances
                for key in ("strict-match", "flexible-extract")
            ]
        )
    assert scored[0] == scored[1]
    assert 0 < sum(result["exact_match"] for _, result in scored[0]) < len(scored[0])


def _questions(count: int, seed: int, subject: str) -> list[dict[str, Any]]:
    draw = random.Random(f"{subject}{seed}")
    rows = []
    for number in range(count):
        choices = [str(draw.randint(0, 99)) for _ in range(4)]
        question = f' What, in "{subject}", is no. {number},\nby and large? '
        answer = draw.randrange(4)
        rows.append(
            {"question": question, "choices": choices, "answer": answer, "subject": subject}
        )
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            writer.writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


@pytest.mark.parametrize("layout", ["csv", "parquet"])
@pytest.mark.parametrize("shots", [0, 5])
def test_against_mmlu(tmp_path: Path, shots: int, layout: str) -> None:
    stock = {}
    every: dict[str, list[dict[str, Any]]] = {"test": [], "dev": []}
    for subject in SUBJECTS:
        parts = {"test": _questions(4, 0, subject), "dev": _questions(5, 1, subject)}
        stock[f"mmlu_{subject}"] = _stock(f"mmlu/default/mmlu_{subject}.yaml", parts, shots)
        for name, rows in parts.items():
            every[name] += rows
            _write_csv(tmp_path / "csv" / name / f"{subject}_{name}.csv", rows)
    (tmp_path / "parquet/all").mkdir(parents=True)
    for name, rows in every.items():
        file = tmp_path / f"parquet/all/{name}-00000-of-00001.parquet"
        Dataset.from_list(rows).to_parquet(file)
    ours = _ours(f"mmlu@{shots}", tmp_path / layout)
    assert ours.keys() == stock.keys()
    for name, task in ours.items():
        assert _requests(task) == _requests(stock[name])


def test_every_subject_is_described_as_in_the_stock_task(tmp_path: Path) -> None:
    files = sorted((STOCK / "mmlu/default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        subject = file.stem.removeprefix("mmlu_")
        _write_csv(tmp_path / f"{subject}_test.csv", _questions(1, 0, subject))
    ours = _ours("mmlu@0", tmp_path)
    load = import_module("lm_eval.tasks._yaml_loader").load_yaml
    for file in files:
        stock = load(file)
        assert ours[stock["task"]].get_config("description") == stock["description"]


def _humaneval() -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'\n\ndef add{n}(a, b):\n    """ Add.\n    >>> add{n}(1, 2)\n    """\n',
            "entry_point": f"add{n}",
            "canonical_solution": "    return a + b\n",
            "test": "\n\nMETADATA = {}\n\n\ndef check(f):\n    assert f(1, 2) == 3\n\n",
        }
        for n in range(3)
    ]


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_against_humaneval(tmp_path: Path, name: str) -> None:
    rows = _jsonl(tmp_path / name, _humaneval())
    stock = _stock("humaneval/humaneval.yaml", {"test": rows}, None)
    (ours,) = _ours("humaneval", tmp_path).values()
    assert _requests(ours) == _requests(stock)
    for row in rows:
        (built,) = import_module("lm_eval.tasks.humaneval.utils").build_predictions([["x"]], [row])
        assert program("humaneval", row, "x").rstrip() == "\n".join(
            [*built, stock.doc_to_target(row)]
        )


def _mbpp(ids: range, text: str = "text") -> list[dict[str, Any]]:
    return [
        {
            "task_id": n,
            text: f"Write a function to add {n} to a number.",
            "code": f"def add(a):\r\n    return a + {n}",
            "test_list": [f"assert add({i}) == {n + i}" for i in range(3)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for n in ids
    ]


@pytest.mark.parametrize("shots", [0, 3])
def test_against_mbpp(tmp_path: Path, shots: int) -> None:
    rows = _jsonl(tmp_path / "mbpp.jsonl", _mbpp(range(8, 14)) + _mbpp(range(509, 513)))
    test = [row for row in rows if 11 <= row["task_id"] <= 510]  # the hub's test part
    stock = _stock("mbpp/mbpp.yaml", {"test": test}, shots)
    (ours,) = _ours(f"mbpp@{shots}", tmp_path).values()
    assert _requests(ours) == _requests(stock)
    assert len(_requests(ours)) == 5
    document = ours.task_docs[0]
    assert program("mbpp", document, "x") == f"x\n{stock.doc_to_target(test[0])}\n"


def test_a_limit_takes_the_first_documents(tmp_path: Path) -> None:
    test = _jsonl(tmp_path / "test.jsonl", _problems(6, 0))
    train = _jsonl(tmp_path / "train.jsonl", _problems(30, 1))
    stock = _stock("gsm8k/gsm8k.yaml", {"train": train, "test": test}, 8)
    (ours,) = _ours("gsm8k", tmp_path, limit=2).values()
    assert _requests(ours) == _requests(stock, limit=2)
