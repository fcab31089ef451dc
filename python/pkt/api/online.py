"""A teacher that stays in memory while the student learns: ``--online``.

What it says and thinks is what its targets would hold (`pkt.methods.targeting.LiveTargets`); only
nothing is written, and both models have to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.device import free_device_bytes, require_device_fit
from pkt.config import MIB, format_bytes
from pkt.errors import BudgetError, UsageError
from pkt.records import IoMode, Plan, Reading

if TYPE_CHECKING:
    from pkt.api.supervising import Choice
    from pkt.methods.targeting import Task
    from pkt.methods.tuning import Online

Paired = Callable[[list[dict[str, Any]]], None]


def require_online(
    online: bool,
    teacher: str | None,
    folder: str | Path | None,
    distill: str | None,
    top_k: int | None,
    processes: int,
) -> None:
    """Refuse options of `pkt train` that do not go with ``--online``, or not without.

    Raises:
        UsageError: as said.

    """
    if not online:
        for name, value in (("--teacher", teacher), ("--top-k", top_k)):
            if value is not None:
                raise UsageError(
                    f"{name}: not used without --online",
                    "add --online, or give --teacher-targets DIR alone",
                )
        return
    if not distill:
        raise UsageError(
            "--online: not used without --distill",
            "add --distill topk-kl, or take pkt align --online",
        )
    if not teacher:
        raise UsageError("--online: which teacher stays in memory?", "add --teacher MODEL")
    if top_k is not None and (distill != "topk-kl" or top_k < 1):
        what = "expected 1 or more" if distill == "topk-kl" else f"not used with {distill}"
        raise UsageError(f"--top-k {top_k}: {what}")
    require_alone(folder, processes)


def require_alone(folder: str | Path | None, processes: int) -> None:
    """Refuse what goes with written targets only.

    Raises:
        UsageError: a folder of targets, or several processes.

    """
    if folder:
        raise UsageError(
            "--teacher-targets: not used with --online, which writes and reads none",
            "leave one of them out",
        )
    if processes > 1:
        raise UsageError(
            f"--online: expected one process, found {processes}",
            "write targets once: all processes read them, with no teacher in memory",
        )


def said_online(task: Task, distill: str, weight: float) -> Online:
    """A teacher whose logits are learnt."""
    from pkt.methods import targeting
    from pkt.methods.tuning import Online, Taught
    from pkt.training import Distillation, WholeDistillation

    def teach(work: Path, place: Any, notify: Any) -> Taught:
        targets, found = targeting.hold(
            task, work, logits=True, io=_reading(task, "auto"), device=place, notify=notify
        )
        rows = task.config.rows
        made: Any = (
            WholeDistillation(targets.whole, rows, weight)
            if distill == "kl"
            else Distillation(targets.of, rows, weight)
        )
        return Taught(made, None, found, targets.close)

    return Online(_origin(task), task.teacher.checkpoint.state(), task.plan, teach)


def thought_online(task: Task, choice: Choice, io: IoMode | Reading, paired: Paired) -> Online:
    """A teacher whose activations are learnt."""
    from pkt.api.mapped import map_maker
    from pkt.api.supervising import require_rows
    from pkt.methods import targeting
    from pkt.methods.tuning import Online, Taught
    from pkt.training import ALIGNMENTS

    assert task.states
    assert task.student
    interface, depth = task.states.interface, task.student.layers

    def teach(work: Path, place: Any, notify: Any) -> Taught:
        chosen = _reading(task, io)
        targets, found = targeting.hold(
            task, work, logits=choice.wants_logits, io=chosen, device=place, notify=notify,
            make_map=map_maker(task, chosen.mode, str(place), notify), paired=paired,
        )  # fmt: skip
        objective: Any = ALIGNMENTS[choice.objective](
            targets, interface, depth, task.config.rows, choice.output_loss or "cosine",
            choice.kl_weight,
        )  # fmt: skip
        require_rows("--online", choice, targets)
        return Taught(objective, objective.layers, found, targets.close, targets.kernels())

    return Online(_origin(task), task.teacher.checkpoint.state(), task.plan, teach)


def require_both_fit(plan: Plan, device: str) -> None:
    """Raise `BudgetError` unless teacher and student fit the memory, or that of a device."""
    if device != "cpu":
        require_device_fit(plan, free_device_bytes(device))
        return
    if not plan.fits:
        raise BudgetError(
            f"--online: teacher and student hold {format_bytes(plan.peak_bytes)} together; "
            f"{plan.budget_source} allows {format_bytes(plan.budget_bytes)}",
            f"--max-ram {plan.smallest_bytes // MIB}MiB fits; without --online the teacher is "
            "streamed, for the same numbers",
        )
    for disk in plan.disks:
        if disk.bytes > disk.free_bytes:
            raise BudgetError(
                f"{disk.folder}: attribution writes {format_bytes(disk.bytes)} there, and its "
                f"disk has {format_bytes(disk.free_bytes)} free",
                "make room, take --spool-dir on another disk, or name the layers with --pairs",
            )


def open_said(
    teacher: str, student: str, data: str | Path, distill: str, top_k: int | None,
    options: Mapping[str, Any],
) -> Task:  # fmt: skip
    """The teacher of ``pkt train --online``, opened and planned; errors as of `prepare_targets`."""
    from pkt.api.aligning import TOP_K, prepare_targets

    kept = 0 if distill == "kl" else top_k or TOP_K
    return prepare_targets(teacher, student, data, top_k=kept, online=True, **options)


def _reading(task: Task, io: IoMode | Reading) -> Reading:
    from pkt.api.fitting import reading

    return io if isinstance(io, Reading) else reading(task, io)


def _origin(task: Task) -> dict[str, Any]:
    """What the manifest says of a teacher in memory, in place of the folder of its targets."""
    asked = task.identity()
    found = {
        "online": True,
        "top_k": task.config.top_k,
        "teacher": asked["teacher"],
        "teacher_dtype": task.config.dtype,
        "vocabulary": asked["vocabulary"],
    }
    if not task.states:
        return found
    states: dict[str, Any] = asked["states"]
    pairs = task.states.pairs
    if pairs is not None:
        states = {**states, "pairs": [[pair.teacher, pair.student, pair.mix] for pair in pairs]}
    texts = {"texts": asked["texts"]} if "texts" in asked else {}
    return {**found, **states, **texts}
