"""One cell of a comparison: an arm, a learning rate, a repeat; trained once, measured, kept."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api import (
    execute,
    execute_targets,
    prepare,
    prepare_align,
    prepare_targets,
    prepare_training,
)
from pkt.compare.arms import Arm
from pkt.errors import DivergenceError
from pkt.records import SampleSet

if TYPE_CHECKING:
    from pkt.api import Aligning
    from pkt.methods.tuning import Task

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one training run of a comparison came to."""

    arm: str
    rate: float
    repeat: int
    validation: float  #: nats a token; infinite if training diverged
    test: tuple[float, ...]  #: Σ nll of each test example
    trainable: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What all cells share.

    ``extract`` and ``train`` are options of `pkt.api.prepare` and `prepare_training`.
    """

    teacher: str
    student: str
    seeds: Path
    data: Path
    validation: SampleSet
    test: SampleSet
    extract: Mapping[str, Any]
    train: Mapping[str, Any]
    norms_from: Path | None
    device: str


@dataclass
class Cells:
    """Runs cells and keeps their results in ``work/cells``: each is trained once.

    The student is loaded once: a trained adapter is taken off it again.
    """

    setting: Setting
    work: Path
    stop: Stop
    report: Callable[[Cell], None]
    student: Any = None
    _tasks: dict[str, Task] = field(default_factory=dict)

    def run(self, arm: Arm, rate: float, repeat: int) -> Cell:
        """The cell, trained now unless it is there."""
        path = self.work / "cells" / f"{_slug(arm.name)}-{rate:g}-{repeat}.json"
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            return Cell(
                **{**held, "validation": _number(held["validation"]), "test": tuple(held["test"])}
            )
        cell = self._train(arm, rate, repeat, self.work / "training")
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(as_row(cell)), encoding="utf-8")
        temporary.rename(path)
        self.report(cell)
        return cell

    def task(self, arm: Arm, repeat: int) -> Task:
        """The training run of an arm; random starts are extracted anew for each repeat."""
        drawn = repeat if arm.random_start else 0
        key = f"{arm.name} {drawn}"
        if key not in self._tasks:
            setting, options = self.setting, dict(self.setting.train)
            options |= {k: v for k, v in arm.train.items() if k != "targets" or not arm.extracts}
            if arm.extracts:
                options["init"] = str(self._extracted(arm, drawn))
                for name in ("targets", "embeddings", "layers", "rank"):
                    options.pop(name, None)
            elif setting.norms_from and options["init"] in ("pissa", "gaussian"):
                options["norms_from"] = setting.norms_from
            if arm.examples:
                options["max_examples"] = arm.examples
            if arm.distils:
                options["teacher_targets"] = self._teacher_targets(options)
            if arm.aligns:
                self._tasks[key] = self._aligned(options, arm.states).trained()
                return self._tasks[key]
            if arm.like:
                alike = self._aligned({**options, "objective": arm.like}, arm.states).trained()
                options |= {"targets": alike.config.targets, "layers": alike.config.layers}
            self._tasks[key] = prepare_training(setting.student, setting.data, **options)
        return self._tasks[key]

    def _aligned(self, train: Mapping[str, Any], states: Mapping[str, Any]) -> Aligning:
        """An alignment whose targets are written, once for all arms that share their options."""
        from pkt.training import Schedule

        setting = self.setting
        # As long as every other arm; an objective's own default is longer.
        options = {"epochs": Schedule().epochs, **train, "states": states}
        options["modules"] = options.pop("targets", None)
        for name in ("embeddings", "layers"):
            options.pop(name, None)
        asked = [options["objective"], sorted(states.items()), options.get("max_examples", "all")]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        folder = self.work / "targets" / f"{options['objective']}-{digest[:12]}"
        folder.parent.mkdir(exist_ok=True)
        made = prepare_align(
            setting.teacher, setting.student, setting.data, teacher_targets=folder, **options
        )
        execute_targets(made.targets, made.folder, device=setting.device, notify=self._notify)
        return made

    def _extracted(self, arm: Arm, repeat: int) -> Path:
        """The arm's extraction, made once for all arms that share its options."""
        setting = self.setting
        options = {**setting.extract, **(arm.extract or {}), "seed": repeat}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
        folder = self.work / "extracted" / digest.hexdigest()[:16]
        folder.parent.mkdir(exist_ok=True)
        task = prepare(
            setting.teacher, setting.student, setting.seeds, output_dir=folder, **options
        )

        execute(task, folder, device=setting.device, notify=self._notify)
        return folder

    def _teacher_targets(self, train: Mapping[str, Any]) -> Path:
        """The teacher's logits on the training data, written once for all arms that share it."""
        setting, names = self.setting, ("template", "max_tokens", "max_examples", "max_ram")
        options = {name: train[name] for name in (*names, "aliases") if name in train}
        folder = self.work / "targets" / f"{options.get('max_examples', 'all')}"
        folder.parent.mkdir(exist_ok=True)
        task = prepare_targets(
            setting.teacher, setting.student, setting.data, output_dir=folder, **options
        )
        execute_targets(task, folder, device=setting.device, notify=self._notify)
        return folder

    def _notify(self, phase: str, done: int, total: int) -> None:
        if self.stop():
            raise KeyboardInterrupt

    def _train(self, arm: Arm, rate: float, repeat: int, folder: Path) -> Cell:
        import torch

        from pkt.evaluation import cross_entropy, mean_loss
        from pkt.methods import tuning
        from pkt.methods.tuning.model import load_student
        from pkt.products import bfloat16_products

        setting, task, began = self.setting, self.task(arm, repeat), time.perf_counter()
        schedule = replace(task.config.schedule, lr=rate, seed=repeat)
        task = replace(task, config=replace(task.config, schedule=schedule))
        place = torch.device(setting.device)
        if self.student is None:
            dtype = tuning.DTYPES[task.config.dtype]
            self.student = load_student(task.student.folder, dtype, place)
        claim = folder / "cell.json"
        wanted = json.dumps([arm.name, rate, repeat])
        if not claim.is_file() or claim.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(folder, ignore_errors=True)  # another cell's checkpoints
            folder.mkdir()
            claim.write_text(wanted, encoding="utf-8")
        trainable, validation, test = 0, math.inf, [math.inf] * len(setting.test.samples)
        try:
            with bfloat16_products(place, tuning.DTYPES[task.config.dtype]):
                made = tuning.train(
                    task, folder / "checkpoints", place, stop=self.stop, student=self.student
                )
                validation = mean_loss(cross_entropy(made.model, setting.validation.samples))[0]
                test = [loss.nll_sum for loss in cross_entropy(made.model, setting.test.samples)]
            trainable, self.student = made.trainable, made.model.unload()
        except DivergenceError:
            self.student = None  # it is still wrapped: load it anew
        shutil.rmtree(folder)
        if not math.isfinite(validation):
            validation, test = math.inf, [math.inf] * len(test)
        seconds = time.perf_counter() - began
        return Cell(arm.name, rate, repeat, validation, tuple(test), trainable, round(seconds, 1))


def as_row(cell: Cell) -> dict[str, Any]:
    """A cell as JSON holds it: infinity is null."""
    finite = math.isfinite(cell.validation)
    return {
        "arm": cell.arm,
        "rate": cell.rate,
        "repeat": cell.repeat,
        "validation": cell.validation if finite else None,
        "test": list(cell.test) if finite else [],
        "trainable": cell.trainable,
        "seconds": cell.seconds,
    }


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-=." else "_" for c in name)
