"""Running lm-eval's tasks on a model that is loaded already, quietly, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from pkt.evaluation.logits import evaluating
from pkt.evaluation.quiet import silence

Row = dict[str, Any]
Step = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one model on one task."""

    metric: str  #: lm-eval's spelling, with its filter: "exact_match,strict-match"
    value: float
    error: float  #: standard error; NaN where there is none
    count: int  #: documents
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Scores over all parts of a task, and a row for each document and filter."""

    scores: tuple[Score, ...]
    rows: tuple[Row, ...]
    parts: Mapping[str, Mapping[str, float]]  #: value of each metric on each part, if several
    cut: int = 0  #: prompts that were longer than the model takes, shortened from the left


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 8,
    limit: int = 0,
    seed: int = 1234,
    quiet: bool = True,
    notify: Step = lambda done, total: None,
) -> TaskResult:
    """Evaluate a loaded model on the parts of one task.

    Several parts count by their documents: each mean is over all documents, its standard error
    ``s/√N`` of their values. A single part's numbers are lm-eval's own.

    Args:
        model: causal model or PeftModel; in any mode, on any device.
        tokenizer: of the model.
        tasks: lm-eval tasks by name.
        batch_size: prompts in a batch.
        limit: first so many documents of each part; 0 for all.
        seed: of the few-shot draws, which begin anew for each call.
        quiet: keep lm-eval's bars, prints and log lines away.
        notify: told of (requests answered, requests in all).

    """
    from lm_eval.evaluator import evaluate

    with silence(quiet) as aloud, evaluating(model):
        lm = _language_model(model, tokenizer, batch_size, lambda a, b: aloud(notify, a, b))
        with _fitting_generation(tasks, lm.max_length):
            for task in tasks.values():
                task.set_fewshot_seed(seed=seed)
            found = evaluate(
                lm=lm, task_dict=dict(tasks), limit=limit or None, bootstrap_iters=1000
            )
    several = len(tasks) > 1
    rows = [_row(name, sample, several) for name in tasks for sample in found["samples"][name]]
    parts = {name: _values(found["results"][name]) for name in tasks}
    scores = _pooled(found, tasks) if several else _single(found, next(iter(tasks)))
    return TaskResult(tuple(scores), tuple(rows), parts if several else {}, lm.cut)


def _language_model(model: nn.Module, tokenizer: Any, batch_size: int, notify: Step) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]
        """lm-eval's transformers model, which says how far it is and counts what it cuts."""

        def __init__(self) -> None:
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
            )
            self.cut, self._done, self._total = 0, 0, 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._done, self._total = 0, len(requests)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._done, self._total = 0, len(requests)
            for request in requests:
                longest = request.args[1].get("max_gen_toks", self.max_gen_toks)
                self.cut += len(self.tok_encode(request.args[0])) > self.max_length - longest
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return found

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            self.cut += len(inps) * (inps.shape[1] >= self.max_length)
            self._advance(len(inps))
            return found

        def _advance(self, count: int) -> None:
            self._done = min(self._done + count, self._total)
            notify(self._done, self._total)

    return Quiet()


@contextmanager
def _fitting_generation(tasks: Mapping[str, Any], positions: int) -> Iterator[None]:
    """Half of the model's positions are for the answer where lm-eval would refuse to generate."""
    changed = []
    for task in tasks.values():
        if task.get_config("output_type") == "generate_until":
            kept = dict(task.get_config("generation_kwargs"))
            if kept.get("max_gen_toks", 256) >= positions:
                room = {**kept, "max_gen_toks": max(1, positions // 2)}
                task.set_config(key="generation_kwargs", value=room)
                changed.append((task, kept))
    try:
        yield
    finally:
        for task, kept in changed:
            task.set_config(key="generation_kwargs", value=kept)


def _row(name: str, sample: Mapping[str, Any], several: bool) -> Row:
    row: Row = {"part": name} if several else {}
    row |= {"doc_id": sample["doc_id"], "filter": sample["filter"], "doc": sample["doc"]}
    row |= {"target": sample["target"]}
    if isinstance(sample["filtered_resps"][0], str):
        row["prompt"] = sample["arguments"][0][0]
        row |= {"generation": sample["resps"][0][0], "answer": sample["filtered_resps"][0]}
    else:
        row["responses"] = sample["filtered_resps"]
    return row | {metric: sample[metric] for metric in sample["metrics"]}


def _single(found: Mapping[str, Any], name: str) -> Iterator[Score]:
    results, better = found["results"][name], found["higher_is_better"][name]
    count = found["n-samples"][name]["effective"]
    for key, value in _values(results).items():
        metric, _, which = key.partition(",")
        error = results.get(f"{metric}_stderr,{which}")
        yield Score(
            _label(key), value, error if isinstance(error, float) else math.nan, count,
            better.get(metric) is not False,
        )  # fmt: skip


def _pooled(found: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[Score]:
    values: dict[str, list[float]] = {}
    better: dict[str, bool] = {}
    for name in names:
        for sample in found["samples"][name]:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (int, float)):
                    key = _label(f"{metric},{sample['filter']}")
                    values.setdefault(key, []).append(float(sample[metric]))
                    better[key] = found["higher_is_better"][name].get(metric) is not False
    for key, each in values.items():
        yield mean_score(key, each, better[key])


def mean_score(metric: str, values: Sequence[float], higher_is_better: bool = True) -> Score:
    """Mean of one value a document, with ``s/√N``; its error is NaN for a single one."""
    number = len(values)
    mean = math.fsum(values) / number
    spread = math.fsum((value - mean) ** 2 for value in values)
    error = math.sqrt(spread / (number - 1) / number) if number > 1 else math.nan
    return Score(metric, mean, error, number, higher_is_better)


def _values(results: Mapping[str, Any]) -> dict[str, float]:
    """Metric values among an lm-eval result's keys ("acc,none"; not "acc_stderr,none")."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _label(key: str) -> str:
    return key.removesuffix(",none")
