"""LoRA fine-tuning of the student from a start, and its export onto the untouched student.

Zhong et al., "Seeking Neural Nuggets: Knowledge Transfer in Large Language Models from a
Parametric Perspective", ICLR 2024, https://arxiv.org/abs/2310.11451, section 3.2.

===========================  ==========================================
paper                        here
===========================  ==========================================
B, A of the extraction       `begin`: the start, or a control's
W* = (W − B₀A₀) + BA         `inject`: (A₀, −B₀) frozen beside (A, B)
fine-tuning                  `fit`
the student that is served   [B | −B₀], [A ; A₀], a LoRA of rank 2r
===========================  ==========================================
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pkt.card import tuned_card
from pkt.evaluation import cross_entropy
from pkt.host import Costs, PeakMeter, one_thread
from pkt.methods.tuning.export import write_tuned
from pkt.methods.tuning.likeness import student_kernels
from pkt.methods.tuning.model import begin, load_student
from pkt.methods.tuning.record import manifest, run_record, similarity
from pkt.methods.tuning.task import DTYPES, Config, Online, Task, Taught
from pkt.output import MANIFEST, as_json, as_jsonl, publish, run_folder
from pkt.processes import is_first, share, sum_over_processes, wait_for_all
from pkt.products import bfloat16_products
from pkt.records import Sample, Tuning
from pkt.report import write_curves
from pkt.training import StepZero, compare_logits, first_logits, fit, inject
from pkt.workplace import WORK

__all__ = ["DTYPES", "Config", "Online", "Task", "Taught", "run", "train"]

SMALL_WIDTH = 128  # of the residual stream; narrower products lose more to threads than they gain

Notify = Callable[[str, int, int, Mapping[str, float]], None]
"""Told of (phase, steps done, steps in all, metrics)."""


@dataclass(frozen=True)
class Trained:
    """A model whose factors are trained, and what was measured on the way."""

    model: Any  #: the PEFT model
    trainable: int  #: parameters
    step_zero: StepZero
    metrics: list[dict[str, float]]
    kernels: tuple[torch.Tensor, ...] = ()  #: of its layers, before and after; (L_S, n, n)


def run(
    task: Task,
    folder: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    save_steps: int = 0,
    notify: Notify = lambda phase, done, total, metrics: None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuning:
    """Train and export; the same call continues a run that was interrupted.

    Args:
        task: opened inputs and options.
        folder: OUT.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        save_steps: steps between checkpoints; 0: one about every five minutes.
        notify: told of each step.
        stop: asked after every step; if true, a checkpoint is kept and the run ends.

    Returns:
        the finished run; in all but the first of several processes, without what it found.

    Raises:
        KeyboardInterrupt: ``stop`` was true.
        PktError: and its subclasses, see `pkt.errors`.

    """
    place, costs, peak = torch.device(device), Costs(), PeakMeter()
    identity = {**task.identity(), "device": place.type}
    if task.online:
        identity["weights"] = dict(task.online.weights)
    small = task.student.hidden_size < SMALL_WIDTH
    with (
        peak.running(),
        _multiplying(task, place),
        one_thread(small),
        _shared_folder(folder, identity, overwrite, task.processes) as work,
    ):
        taught: Taught | None = None
        if task.online:
            with costs.phase("teacher"):
                taught = task.online.teach(work, place, partial(_told, notify, stop))
            layers = taught.layers or task.config.layers
            task = replace(
                task, objective=taught.objective, found=taught.found, kernels=taught.kernels,
                config=replace(task.config, layers=layers),
            )  # fmt: skip
        trained = train(
            task, work / "checkpoints", place, save_steps=save_steps, notify=notify, stop=stop,
            costs=costs, compared=True,
        )  # fmt: skip
        if taught:
            taught.close()
        if not is_first():
            wait_for_all()
            return Tuning(folder, identity, {}, trained.metrics)
        staged = work / "result"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        with costs.phase("export"):
            exported = write_tuned(task, trained.model, staged)
        found = manifest(task, trained.step_zero, exported, trained.metrics)
        if task.kernels:
            found["similarity"] = similarity(task.kernels, *trained.kernels)
        with costs.phase("report"):
            write_curves(staged / "report", found, trained.metrics)
        record = run_record(costs, peak, trained.trainable)
        texts = {
            "metrics.jsonl": as_jsonl(trained.metrics),
            "README.md": tuned_card(found, task.base_model),
            "pkt_run.json": as_json(record),
            MANIFEST: as_json(found),
        }
        publish(folder, staged, texts)
        wait_for_all()
    return Tuning(folder, found, record, trained.metrics)


def _multiplying(task: Task, device: torch.device) -> AbstractContextManager[object]:
    """How the student multiplies."""
    config = task.config
    mixed = [torch.bfloat16] if config.schedule.autocast else []
    return bfloat16_products(device, DTYPES[config.dtype], *mixed)


def _told(notify: Notify, stop: Callable[[], bool], phase: str, done: int, total: int) -> None:
    """Progress of what comes before the first step, which may be stopped too."""
    notify(phase, done, total, {})
    if stop():
        raise KeyboardInterrupt


@contextmanager
def _shared_folder(
    folder: Path, identity: Mapping[str, Any], overwrite: bool, processes: int
) -> Iterator[Path]:
    """The work folder; of several processes the first claims it, the others wait for that."""
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=identity["device"] == "cpu")  # joins the processes
    if is_first():
        with run_folder(folder, identity, overwrite) as work:
            wait_for_all()
            yield work
    else:
        wait_for_all()
        yield folder / WORK


def train(
    task: Task,
    checkpoints: Path,
    device: torch.device,
    *,
    save_steps: int = 0,
    notify: Notify = lambda phase, done, total, metrics: None,
    stop: Callable[[], bool] = lambda: False,
    costs: Costs | None = None,
    student: Any = None,
    compared: bool = False,
) -> Trained:
    """The steps of the method up to the trained model.

    ``student``: already loaded; ``compared``: its layers are held against the teacher's kernels.
    """
    config, costs = task.config, costs or Costs()
    dtype, samples = DTYPES[config.dtype], task.samples.samples
    with costs.phase("load"):
        model = student or load_student(task.student.folder, dtype, device)
    # 1. The start: B₀ and A₀ of each module.
    with costs.phase("start"):
        start = begin(task, model)
    # 2. (A₀, −B₀) frozen beside the trained (A, B): at step 0 the model is the student.
    with costs.phase("step 0"):
        before = first_logits(model, samples)
        model = inject(model, start.trained, start.frozen, config.dropout)
        after = first_logits(model, samples)
        step_zero = compare_logits(before, after, dtype, task.student.layers)
        step_zero.require("step 0: the model with its start is not the student")
    held_out = _held_out(task.held_out.samples) if task.held_out else None
    metrics: list[dict[str, float]] = []
    if held_out:
        with costs.phase("evaluate"):
            metrics.append({"step": 0, "epoch": 0.0, "eval_loss": held_out(model)})
        notify("train", 0, 0, metrics[0])
    places = task.kernels.places if task.kernels and compared else ()
    look = partial(student_kernels, layers=task.student.layers, samples=samples, places=places)
    kernels = []
    if places:
        with costs.phase("similarity"):
            kernels.append(look(model))
    # 3. Fine-tuning.
    with costs.phase("train"):
        metrics += fit(
            model, samples, config.schedule, checkpoints, objective=task.objective,
            held_out=held_out,
            notify=lambda step, steps, found: notify("train", step, steps, found),
            stop=stop, save_steps=save_steps,
        )  # fmt: skip
    if places:
        with costs.phase("similarity"):
            kernels.append(look(model))
    trainable = sum(half.a.numel() + half.b.numel() for half in start.trained.values())
    return Trained(model, trainable, step_zero, metrics, tuple(kernels))


def _held_out(samples: Sequence[Sample]) -> Callable[[Any], float]:
    """Mean loss a token over ``samples``, shared among the processes there are."""

    def measure(model: Any) -> float:
        losses = cross_entropy(model, share(samples))
        nll, tokens = sum_over_processes(
            [sum(x.nll_sum for x in losses), sum(x.tokens for x in losses)], model.device
        )
        return nll / tokens

    return measure
