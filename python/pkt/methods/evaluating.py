"""Evaluating models beside each other: one step a model and task, each kept when it is done."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.evaluation import agreement, cross_entropy, mean_agreement, mean_loss
from pkt.evaluation.columns import Adapter, Models
from pkt.evaluation.formats import Part
from pkt.evaluation.harness import Score, run_tasks
from pkt.evaluation.prompts import instruction_prompt
from pkt.evaluation.quiet import silence
from pkt.evaluation.scoring import score_programs
from pkt.evaluation.steps import Steps, number
from pkt.evaluation.table import compare, markdown
from pkt.evaluation.tasks import CODE, Asked, lm_eval_tasks, local_tasks
from pkt.host import PeakMeter, describe
from pkt.models import Model
from pkt.output import finished, publish, run_folder
from pkt.products import bfloat16_products
from pkt.records import Evaluation, SampleSet

RESULTS = ("results.json", "results.md", "details")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}

Notify = Callable[[str, int, int], None]
Step = Callable[[int, int], None]


@dataclass
class Request:
    """An evaluation that is known to be possible: everything opened, no weight read."""

    student: Model
    teacher: Model | None
    adapters: list[Adapter]
    asked: list[Asked]
    samples: SampleSet | None  #: of the task ``loss``
    parts: dict[str, list[Part]]  #: local documents, by task label
    tokenizers: dict[str, Any]  #: by role
    shared_rows: int | None  #: tokens of the vocabulary that student and teacher share
    data: dict[str, Any]
    dtypes: dict[str, str]  #: by role, "F32" or "BF16"
    options: dict[str, Any]  #: those that change a result
    batch_size: int
    device: str
    notes: list[str] = field(default_factory=list)
    known: dict[tuple[str, str], Any] = field(default_factory=dict)  #: lm-eval tasks built

    @property
    def columns(self) -> list[str]:
        """Student, adapters, teacher."""
        last = ["teacher"] if self.teacher else []
        return ["student", *(adapter.label for adapter in self.adapters), *last]

    def torch_dtypes(self) -> dict[Path, torch.dtype]:
        """What each model folder is computed in."""
        found = {self.student.folder: _DTYPES[self.dtypes["student"]]}
        if self.teacher:
            found[self.teacher.folder] = _DTYPES[self.dtypes["teacher"]]
        return found

    def lm_tasks(self, asked: Asked, role: str) -> Any:
        """The lm-eval tasks of an entry, by name; AlpacaFarm's prompts are each model's own."""
        key = (asked.label, role if asked.name == "alpacafarm" else "")
        if key not in self.known:
            limit, seed = self.options["limit"], self.options["seed"]
            longest = self.options["max_new_tokens"]
            if asked.label not in self.parts:
                self.known[key] = lm_eval_tasks(asked, seed=seed, max_new_tokens=longest)
            else:
                tokenizer, template = self.tokenizers[role], self.options["template"]
                self.known[key] = local_tasks(
                    asked, self.parts[asked.label], limit=limit, seed=seed, max_new_tokens=longest,
                    render=(lambda row: instruction_prompt(row, tokenizer, template))
                    if asked.name == "alpacafarm" else None,
                )  # fmt: skip
        return self.known[key]

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: hashes and options, no paths."""
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "eval",
            "model": self.student.hashes(),
            "teacher": self.teacher.hashes() if self.teacher else None,
            "adapters": {adapter.label: adapter.sha256 for adapter in self.adapters},
            "tasks": {asked.label: self.data[asked.label] for asked in self.asked},
            "options": {**self.options, "dtype": self.dtypes},
        }


def finished_run(request: Request, folder: Path) -> Evaluation | None:
    """The result in ``folder`` if it is of this very request."""
    manifest = finished(folder, _plain(request.identity()), RESULTS)
    if manifest is None:
        return None
    results, run = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("results.json", "pkt_run.json")
    )
    return Evaluation(folder, results, manifest, run)


def run(
    request: Request,
    folder: Path,
    *,
    overwrite: bool = False,
    quiet: bool = True,
    notify: Notify = lambda phase, done, total: None,
) -> Evaluation:
    """Run what `prepare_evaluation` found possible; finished steps of an earlier call are kept."""
    if not overwrite and (done := finished_run(request, folder)):
        return done
    identity, meter = _plain(request.identity()), PeakMeter()
    seconds: dict[str, float] = {}
    with meter.running(), run_folder(folder, identity, overwrite) as work:
        steps = Steps(work)
        models = Models(request.student, request.teacher, request.torch_dtypes(), request.device)
        dtypes = request.torch_dtypes().values()
        try:
            with bfloat16_products(torch.device(request.device), *dtypes):
                _run(request, models, steps, seconds, quiet, notify)
        finally:
            models.close()
        found = _collect(request, steps)
        rows = compare(found, request.columns)
        parts = {
            task: {column: step["parts"] for column, step in columns.items() if step.get("parts")}
            for task, columns in found.items()
        }
        results: dict[str, Any] = {
            "columns": request.columns,
            "rows": rows,
            "parts": {task: values for task, values in parts.items() if values},
            "notes": [*request.notes, *_notes(found)],
        }
        manifest = {**identity, "files": sorted([*RESULTS, "pkt_run.json", "pkt_manifest.json"])}
        record = {
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "device": request.device,
            "batch_size": request.batch_size,
            "peak_anonymous_bytes": meter.peak_bytes,
            "versions": _versions(),
            "host": describe(),
        }
        text = markdown(rows, request.columns)
        noted = "".join(f"\n- {note}" for note in results["notes"])
        publish(
            folder,
            steps.staged,
            {
                "results.json": json.dumps(results, indent=1) + "\n",
                "results.md": f"{text}\n{noted}\n" if noted else f"{text}\n",
                "pkt_run.json": json.dumps(record, indent=1) + "\n",
                "pkt_manifest.json": json.dumps(manifest, indent=1) + "\n",
            },
        )
    return Evaluation(folder, results, manifest, record)


def _run(
    request: Request, models: Any, steps: Steps, seconds: dict[str, float], quiet: bool,
    notify: Notify,
) -> None:  # fmt: skip
    """Every step that is not finished: the student, each adapter, the teacher, then agreement."""
    compared = request.teacher is not None and request.samples is not None
    adapters = {adapter.label: adapter for adapter in request.adapters}

    def measure(column: str, label: str, model: Any) -> None:
        begun = time.perf_counter()
        phase = f"{column}: {label}"

        def advance(done: int, total: int) -> None:
            notify(phase, done, total)

        if label == "agreement":
            _agreement(request, steps, column, model, models.teacher(), advance)
        elif label == "loss":
            _loss(request, steps, column, model, advance)
        else:
            asked = next(each for each in request.asked if each.label == label)
            _benchmark(request, steps, column, asked, model, quiet, advance)
        seconds[phase] = time.perf_counter() - begun

    labels = [asked.label for asked in request.asked]
    for column in request.columns:
        todo = [label for label in labels if not steps.has(column, label)]
        if todo and column == "teacher":
            for label in todo:
                measure(column, label, models.teacher())
        elif todo:
            with models.student(adapters.get(column)) as model:
                for label in todo:
                    measure(column, label, model)
    if compared:
        for column in request.columns[:-1]:
            if not steps.has(column, "agreement"):
                with models.student(adapters.get(column)) as model:
                    measure(column, "agreement", model)


def _loss(request: Request, steps: Steps, column: str, model: Any, advance: Step) -> None:

    assert request.samples is not None
    losses = cross_entropy(model, request.samples.samples, notify=advance)
    mean, error = mean_loss(losses)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    scores = [
        Score("loss", mean, error, len(losses), False),
        Score("perplexity", perplexity, perplexity * error, len(losses), False),
    ]
    rows = [
        {"name": each.name, "loss": number(each.nll_sum / each.tokens), "nll_sum": each.nll_sum,
         "tokens": each.tokens}
        for each in losses
    ]  # fmt: skip
    steps.write(column, "loss", scores, rows)


def _agreement(
    request: Request, steps: Steps, column: str, model: Any, teacher: Any, advance: Step
) -> None:

    assert request.samples is not None
    rows = agreement(
        model, teacher, request.samples.samples, rows=request.shared_rows, notify=advance
    )
    mean = mean_agreement(rows)
    scores = [
        Score("KL from teacher", mean.kl, mean.kl_error, len(rows), False),
        Score("top-1 agreement", mean.top1, mean.top1_error, len(rows), True),
    ]
    steps.write(column, "agreement", scores, [asdict(row) for row in rows])


def _benchmark(
    request: Request,
    steps: Steps,
    column: str,
    asked: Asked,
    model: Any,
    quiet: bool,
    advance: Step,
) -> None:

    role = "teacher" if column == "teacher" else "student"
    with silence(quiet):
        tasks = request.lm_tasks(asked, role)
    found = run_tasks(
        model, request.tokenizers[role], tasks, batch_size=request.batch_size,
        limit=request.options["limit"], seed=request.options["seed"], quiet=quiet, notify=advance,
    )  # fmt: skip
    scores, rows = list(found.scores), list(found.rows)
    notes = []
    if found.cut:
        notes.append(f"{found.cut} prompts are longer than the model takes: cut from the left")
    if asked.name in CODE and asked.label in request.parts:
        if request.options["allow_code_exec"]:
            scores, rows = score_programs(asked.name, rows)
        else:
            notes.append("generated programs were not run: --allow-code-exec runs and scores them")
    if asked.name == "alpacafarm":
        notes.append("its answers are for a judge: details/alpacafarm/*.jsonl")
    steps.write(column, asked.label, scores, rows, parts=found.parts, notes=notes)


def _collect(request: Request, steps: Steps) -> dict[str, dict[str, Any]]:
    """Finished steps by task and column; agreement belongs to the loss."""
    found: dict[str, dict[str, Any]] = {}
    for asked in request.asked:
        found[asked.label] = {c: steps.read(c, asked.label) for c in request.columns}
        if asked.name == "loss" and request.teacher:
            for column in request.columns[:-1]:
                agreed = steps.read(column, "agreement")["scores"]
                found["loss"][column]["scores"] += agreed
            exact = {"stderr": 0.0, "count": agreed[0]["count"]}
            found["loss"]["teacher"]["scores"] += [
                {**agreed[0], **exact, "value": 0.0},
                {**agreed[1], **exact, "value": 1.0},
            ]
    return found


def _notes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = {
        f"{task}: {note}": None
        for task, columns in found.items()
        for step in columns.values()
        for note in step.get("notes", [])
    }
    return list(notes)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
