"""Does a start help? Arms side by side, each at its own best learning rate, on the same data.

1. Validation data choose each arm's rate (repeat 0), on a grid that grows past a best edge.
2. The other repeats train with that rate; repeat k has seed k in every arm.
3. Test data give the result, beside student and teacher, and each arm is put against the best
   one that has seen nothing of the teacher by a paired bootstrap.

Sits above `pkt.api`: a comparison is many runs of extract and train.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pkt
from pkt.api import prepare_training
from pkt.compare.arms import ARMS, VARIATIONS, Arm, chosen, varied
from pkt.compare.cells import Cell, Cells, Setting
from pkt.compare.results import ArmResult, Comparison, results, table
from pkt.compare.search import START, best_rate, chosen_rate
from pkt.errors import BudgetError, DataError
from pkt.host import Costs, PeakMeter, describe

__all__ = [
    "ARMS",
    "VARIATIONS",
    "Arm",
    "Cell",
    "Comparison",
    "chosen",
    "compare",
    "table",
    "varied",
]


def compare(
    teacher: str,
    student: str,
    seeds: str | Path,
    data: str | Path,
    eval_data: str | Path,
    output_dir: str | Path,
    *,
    arms: Sequence[Arm],
    test_data: str | Path | None = None,
    lrs: Sequence[float] | None = None,
    repeats: int = 3,
    extract: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    norms_from: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    aliases: Any = None,
    report: Callable[[Cell], None] = lambda cell: None,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Train every arm at its best rate and say which is better; the same call continues.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        seeds: JSONL file that extractions measure on.
        data: JSONL file of training examples.
        eval_data: JSONL file that chooses the rates; halved if there is no ``test_data``: rows of
            odd number choose, rows of even number are the test.
        output_dir: new, empty, or this very comparison's; one that is finished is extended by
            further arms, rates or repeats.
        arms: of `ARMS`, or made by `varied`.
        test_data: JSONL file of the result.
        lrs: the grid to begin with; ``None``: 3e-4, 1e-3, 3e-3.
        repeats: random seeds an arm.
        extract: options of `pkt.extract` that all arms share.
        train: options of `pkt.train` that all arms share.
        norms_from: extraction whose norms pissa and gaussian take.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run left there.
        aliases: table of aliases.
        report: told of each cell that was trained.
        stop: asked after every step; if true, finished cells are kept and `KeyboardInterrupt`
            raised.

    Raises:
        PktError: and its subclasses.

    """
    import torch

    from pkt.api.training import read_held_out
    from pkt.output import MANIFEST, as_json, finished, publish, run_folder
    from pkt.report import write_comparison

    folder, costs, peak = Path(output_dir), Costs(), PeakMeter()
    train = {"dropout": 0.0, "gradient_checkpointing": False, **(train or {}), "aliases": aliases}
    extract = {**(extract or {}), "aliases": aliases}
    base = prepare_training(student, data, init="lora", **train)
    held = read_held_out(base, Path(eval_data), **_kept(train))
    if test_data:
        validation, test = held, read_held_out(base, Path(test_data), **_kept(train))
    else:
        validation, test = _halves(held)
    setting = Setting(
        teacher, student, Path(seeds), Path(data), validation, test, extract, train,
        Path(norms_from) if norms_from else None, device,
    )  # fmt: skip
    rates = tuple(lrs or START)
    shared = _identity(setting, base)
    asked = {"arms": {arm.name: arm.options() for arm in arms}, "rates": list(rates)}
    identity = {**shared, **asked, "repeats": repeats}
    names = ("results.json", "results.md", "details", "report")
    if not overwrite and finished(folder, identity, names):
        return Comparison.read(folder)
    with peak.running(), run_folder(folder, shared, overwrite) as work:
        if (folder / "details").is_dir() and not (work / "cells").exists():
            shutil.copytree(folder / "details", work / "cells")  # of fewer arms or repeats
        cells = Cells(setting, work, stop, report)
        with costs.phase("references"):
            lines = _references(setting, base, cells, torch.device(device))
        measured: list[ArmResult] = []
        for arm in arms:
            with costs.phase(arm.name):

                def measure(rate: float, arm: Arm = arm) -> float:
                    return cells.run(arm, rate, 0).validation

                losses = best_rate(measure, rates, lines["untrained"])
                rate = chosen_rate(losses)
                trained = [cells.run(arm, rate, repeat) for repeat in range(repeats)]
            measured.append(ArmResult(arm, losses, trained))
        found = results(measured, lines, validation, test)
        staged = work / "result"
        shutil.rmtree(staged, ignore_errors=True)
        (staged / "details").mkdir(parents=True)
        for path in sorted((work / "cells").glob("*.json")):
            (staged / "details" / path.name).write_bytes(path.read_bytes())
        write_comparison(staged / "report", found)
        record = {
            "seconds": {name: round(value, 1) for name, value in costs.seconds.items()},
            "peak_anonymous_bytes": peak.peak_bytes,
            "threads": torch.get_num_threads(),
            "host": describe(),
        }
        texts = {
            "results.json": as_json(found),
            "results.md": table(found) + "\n",
            "pkt_run.json": as_json(record),
            MANIFEST: as_json(identity),
        }
        publish(folder, staged, texts)
    return Comparison(folder, found)


def _identity(setting: Setting, base: Any) -> dict[str, Any]:
    """What all cells share: as long as it is the same, none is trained again."""
    from pkt.models import open_model

    options = {
        "extract": {k: v for k, v in setting.extract.items() if k not in ("aliases", "max_ram")},
        "train": {k: v for k, v in setting.train.items() if k not in ("aliases", "max_ram")},
    }
    aliases = setting.extract["aliases"] or {}
    return {
        "format": 2,  # 1 chose rates without trying smaller ones where all did harm
        "pkt": pkt.__version__,
        "method": "compare",
        "teacher": open_model(setting.teacher, aliases, "teacher").hashes(),
        "student": base.student.hashes(),
        "data": base.samples.sha256,
        "seeds": _sha256(setting.seeds),
        "validation": setting.validation.sha256,
        "test": setting.test.sha256,
        "options": options,
        "norms_from": setting.norms_from
        and _sha256(setting.norms_from / "adapter_model.safetensors"),
        "device": setting.device,
    }


def _references(setting: Setting, base: Any, cells: Cells, place: Any) -> dict[str, Any]:
    """Loss of the untouched student and of the teacher on the test, Σ nll by example.

    And ``untrained``: that of the student on the validation data, nats a token.
    """
    path = cells.work / "references.json"
    if path.is_file():
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return held
    from pkt.api.choices import budget, compute_dtype
    from pkt.api.vocabulary import same_vocabulary
    from pkt.evaluation import cross_entropy, mean_loss
    from pkt.methods.tuning import DTYPES
    from pkt.methods.tuning.model import load_student
    from pkt.models import open_model
    from pkt.products import bfloat16_products

    samples, dtype = setting.test.samples, DTYPES[base.config.dtype]
    cells.student = load_student(base.student.folder, dtype, place)
    with bfloat16_products(place, dtype):
        lines: dict[str, Any] = {
            "student": [x.nll_sum for x in cross_entropy(cells.student, samples)],
            "untrained": mean_loss(cross_entropy(cells.student, setting.validation.samples))[0],
        }
    teacher = open_model(setting.teacher, setting.extract["aliases"] or {}, "teacher")
    try:
        if not same_vocabulary(teacher, base.student):
            raise BudgetError("the teacher reads the test as other tokens")
        if teacher.checkpoint.bytes > budget(setting.extract.get("max_ram"))[0]:
            raise BudgetError("the teacher does not fit the memory as a whole")
        dtype = DTYPES[compute_dtype(teacher, setting.train.get("dtype", "auto"))]
        model = load_student(teacher.folder, dtype, place)
        with bfloat16_products(place, dtype):
            lines["teacher"] = [x.nll_sum for x in cross_entropy(model, samples)]
    except BudgetError as error:
        lines["teacher"] = None
        lines["teacher_note"] = error.message
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(lines), encoding="utf-8")
    temporary.rename(path)
    return lines


def _halves(held: Any) -> tuple[Any, Any]:
    from pkt.samples import sample_set

    odd, even = held.samples[::2], held.samples[1::2]
    if len(even) < 2:
        raise DataError(
            f"--eval-data: {len(held.samples)} examples; expected 4 or more: half of them choose "
            "the rates, half are the test",
            "give more, or --test-data",
        )
    return sample_set(odd, held.template), sample_set(even, held.template)


def _kept(train: dict[str, Any]) -> dict[str, Any]:
    return {k: train[k] for k in ("template", "max_tokens") if k in train}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
