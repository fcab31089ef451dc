"""`pkt.align`: SEMALIGN whole: the teacher's activations written once, the student trained on them.

Two runs, each continued where it was: targets in a folder of their own, which other objectives and
other rates use again, and a training run whose result is that of `pkt.train`. Or one run, beside a
teacher that stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.aligning import execute_targets, prepare_targets
from pkt.api.distilling import no_logits
from pkt.api.online import Paired, require_alone, thought_online
from pkt.api.supervising import MODULES, choose_objective
from pkt.api.training import execute_training, prepare_training, require_paired
from pkt.errors import UsageError
from pkt.records import IoMode, Reading, Template, Tuning

if TYPE_CHECKING:
    from pkt.methods import targeting, tuning

Notify = Callable[[str, int, int], None]
Metrics = Callable[[str, int, int, Mapping[str, float]], None]

#: How layers are paired unless it is said: one critical layer, or one for each student layer.
_PAIRING: Mapping[str, Mapping[str, Any]] = {
    "v1": {"critical": 1},
    "v2": {"pair_by": "attribution"},
    "acl": {"pair_by": "attribution"},
    "hidden-mse": {},
}


@dataclass(frozen=True)
class Aligning:
    """An alignment that is planned: both runs' inputs are open, and their options agree."""

    targets: targeting.Task
    folder: Path  #: of the targets, where any are written
    student: str
    data: Path
    training: Mapping[str, Any]  #: options of `prepare_training`

    def trained(self) -> tuning.Task:
        """The training run; of targets that are written, once they are."""
        return prepare_training(self.student, self.data, **self.training)


def beside(output_dir: str | Path) -> Path:
    """The folder of a run's targets unless another is named: OUT.targets."""
    out = Path(output_dir)
    return out.with_name(f"{out.name}.targets")


def prepare_align(
    teacher: str,
    student: str,
    data: str | Path,
    output_dir: str | Path = "OUT",
    *,
    objective: str = "v1",
    teacher_targets: str | Path | None = None,
    online: bool = False,
    output_loss: str | None = None,
    kl_weight: float | None = None,
    modules: Any = None,
    states: Mapping[str, Any] | None = None,
    template: Template = "auto",
    max_tokens: int = 2048,
    max_examples: int = 1000,
    dtype: str = "auto",
    max_ram: str | None = None,
    spool_dir: str | Path | None = None,
    io: IoMode | Reading = "auto",
    paired: Paired = lambda rows: None,
    aliases: Mapping[str, str] | None = None,
    **training: Any,
) -> Aligning:
    """Open and plan both runs; no weight is read.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        data: JSONL file of training examples.
        output_dir: of the student's adapter: says where targets lie by default.
        objective: v1, v2, acl or hidden-mse (`pkt.training.alignment`).
        teacher_targets: folder of the targets; ``None``: OUT.targets beside the result.
        online: no targets: the teacher stays in memory while the student trains, for the same
            numbers.
        output_loss: of v1 and hidden-mse: cosine, ce or kl.
        kl_weight: β of a KL beside a layer loss; ``None``: 1.
        modules: roles or module names that are adapted in the paired layers; ``None``: up, down, v
            and o.
        states: options of `prepare_targets` that say which activations are written, and how;
            interface, map and pairing follow from the objective unless they are among them.
        template: how prompt and answer become one text.
        max_tokens: longer examples are cut.
        max_examples: the first so many rows are used; 0: all.
        dtype: of the teacher's arithmetic and of the student's weights: auto, float32, bfloat16.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        spool_dir: where the teacher's hidden states lie meanwhile.
        io: how a teacher is read that stays in memory.
        paired: with ``online``, as of `execute_targets`.
        aliases: table of aliases; ``None`` for the built-in one.
        **training: further options of `prepare_training`, the schedule's among them.

    Raises:
        UsageError: options that do not go together.
        PktError: and its subclasses, for each input that cannot be used.

    """
    if online:
        require_alone(teacher_targets, int(training.get("processes", 1)))
    folder = Path(teacher_targets) if teacher_targets else beside(output_dir)
    choice = choose_objective(objective, output_loss, kl_weight, folder)
    require_paired(training.get("init", "lora"), None, training.get("embeddings", False))
    wanted = _states(objective, choice.kind, dict(states or {}))
    read: dict[str, Any] = {
        "template": template, "max_tokens": max_tokens, "max_examples": max_examples,
        "dtype": dtype, "max_ram": max_ram, "aliases": aliases,
    }  # fmt: skip
    task = prepare_targets(
        teacher, student, data, states=True, spool_dir=spool_dir,
        output_dir=output_dir if online else folder, online=online, **wanted, **read,
    )  # fmt: skip
    if choice.wants_logits and not task.config.top_k:
        raise no_logits(None if online else folder, f"--objective {objective}")
    read["template"] = task.samples.template
    # Whatever is wrong with the training shall be said before the teacher is read.
    alone = prepare_training(student, data, targets=modules or MODULES, **training, **read)
    if choice.kind.every_layer:
        from pkt.training import require_stages, steps_in_all

        assert task.states
        assert task.student
        known = [pair.student for pair in task.states.pairs or ()]
        layers = known or range(1, task.student.layers + 1)
        steps = steps_in_all(len(alone.samples.samples), alone.config.schedule)
        require_stages(layers, steps, alone.processes)
    learnt = {
        "objective": objective, "output_loss": output_loss, "kl_weight": kl_weight,
        "targets": modules, "teacher_targets": None if online else folder,
        "supervised": thought_online(task, choice, io, paired) if online else None,
    }  # fmt: skip
    return Aligning(task, folder, student, Path(data), {**training, **read, **learnt})


def align(
    teacher: str,
    student: str,
    data: str | Path,
    output_dir: str | Path,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    save_steps: int = 0,
    notify: Notify = lambda phase, done, total: None,
    metrics: Metrics = lambda phase, done, total, found: None,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Tuning:
    """Train ``student`` on the ``teacher``'s activations, and export the adapter to ``output_dir``.

    The teacher is streamed and need not fit in memory; while the student trains it is not there.
    With ``online`` it stays there, and ``metrics`` is told of its phases too.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        data: JSONL file of training examples.
        output_dir: new, empty, or this very run's: the same call continues it.
        io: how the teacher's files are read; "auto" measures.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run left there, targets included.
        save_steps: steps between checkpoints; 0: one about every five minutes.
        notify: told of (phase, steps done, steps in all) while targets are written.
        metrics: told of (phase, steps done, steps in all, metrics) while the student trains.
        stop: asked after every step; if true, a checkpoint is kept and `KeyboardInterrupt` raised.
        **options: of `prepare_align`.

    Raises:
        PktError: and its subclasses; `BudgetError` before anything is read.

    """
    made = prepare_align(teacher, student, data, output_dir, io=io, **options)
    if not made.targets.resident:
        execute_targets(
            made.targets, made.folder, io=io, device=device, overwrite=overwrite, notify=notify
        )
    return execute_training(
        made.trained(), Path(output_dir), device=device, overwrite=overwrite,
        save_steps=save_steps, notify=metrics, stop=stop,
    )  # fmt: skip


def _states(objective: str, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of states, where they are not given those of the objective."""
    found = {name: value for name, value in given.items() if value is not None}
    interface = found.setdefault("interface", kind.interfaces[0])
    if interface not in kind.interfaces:
        known = ", ".join(kind.interfaces)
        raise UsageError(
            f"--interface {interface}: expected one that objective {objective} takes ({known})"
        )
    found.setdefault("map", kind.map)
    if kind.every_layer and (found.get("critical") or found.get("interpolate")):
        option = "--critical" if found.get("critical") else "--interpolate"
        raise UsageError(
            f"{option}: objective {objective} pairs one teacher layer with each student layer",
            "leave it out, or take --pairs",
        )
    if not any(found.get(name) for name in ("pairs", "critical", "interpolate", "pair_by")):
        found = {**_PAIRING[objective], **found}  # --critical 0 asks for every layer
    return found


__all__ = ["Aligning", "align", "beside", "prepare_align"]
