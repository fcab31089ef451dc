"""`pkt align --targets-only`: what the teacher says of the training data, in one pass over it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import aliases, processes, stay_offline
from pkt.cli.options import Session
from pkt.cli.progress import Progress
from pkt.cli.tables import aligned, forward_plan_table, plan_json, recording_summary
from pkt.errors import InterruptError, UsageError
from pkt.records import IoMode, Reading, Recording
from pkt.workplace import WORK, tensors_of

if TYPE_CHECKING:
    from pkt.methods.targeting import Task

_FILE = click.Path(path_type=Path)
_INPUTS = (
    "top_k", "template", "max_tokens", "max_examples", "dtype", "max_ram", "spool_dir",
    "output_dir",
)  # fmt: skip


@click.command(
    short_help="What a teacher says of the training data, for a student to learn.",
    epilog="For example: pkt align --teacher 70b --student 7b --data train.jsonl --targets-only "
    "-o said",
)
@options.models
@click.option("--data", type=_FILE, metavar="FILE.jsonl", help="Training examples.")
@click.option(
    "-o", "--output-dir", type=_FILE, metavar="OUT",
    help="Folder of the result; an unfinished run there is continued.",
)  # fmt: skip
@click.option(
    "--targets-only", is_flag=True,
    help="Write targets for pkt train --teacher-targets; nothing is trained.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(min=0), default=api.TOP_K, show_default=True,
    help="Logits kept of each answer token; 0: those of the whole vocabulary.",
)  # fmt: skip
@options.examples
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
    show_default=True, help="Computed in; auto: the teacher's own, float32 for float16.",
)  # fmt: skip
@options.max_ram
@options.spool_dir
@options.config
@click.option(
    "--io", type=click.Choice(get_args(IoMode)), default="auto", show_default=True,
    help="How the teacher's files are read.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where the arithmetic is done.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def align(session: Session, /, **given: Any) -> None:
    """Write the teacher's largest logits at every answer token of DATA.

    The teacher is read once, layer by layer, and need not fit in memory; the student, whose
    tokenizer must be the teacher's, then learns from OUT without it: pkt train --distill topk-kl
    --teacher-targets OUT, with the same DATA, --template, --max-tokens and --max-examples. An
    interrupted run is continued by the same command.
    """
    needed = ["teacher", "student", "data", *([] if given["dry_run"] else ["output_dir"])]
    if missing := [name for name in needed if not given[name]]:
        flags = ", ".join("-o" if n == "output_dir" else f"--{n}" for n in missing)
        raise UsageError(f"pkt align also needs {flags}", "pkt align --help")
    if not given["targets_only"]:
        raise UsageError(
            "pkt align also needs --targets-only", "the student learns by pkt train --distill"
        )
    if processes()[1] > 1:
        raise UsageError("pkt align runs in one process", "start it without torchrun")
    if given["dry_run"]:
        stay_offline()
    task = api.prepare_targets(
        given["teacher"], given["student"], given["data"], aliases=aliases(),
        **{name: given[name] for name in _INPUTS if given[name] is not None},
    )  # fmt: skip
    if given["dry_run"]:
        _dry_run(task, given)
        return
    made = _perform(session, task, given)
    if given["as_json"]:
        found = {"output_dir": str(made.folder), "manifest": made.manifest, "run": made.run}
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(str(made.folder))


def _dry_run(task: Task, given: Mapping[str, Any]) -> None:
    reading = api.reading(task, given["io"], measured=False)
    if given["as_json"]:
        identity = task.identity()
        found = {
            "plan": plan_json(task.plan),
            "data": {**identity["data"], "longest": task.samples.longest},
            "options": identity["options"],
            "io": {"mode": reading.mode, "reason": reading.reason},
        }
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(_plan(task, reading))
    api.require_fit(task.plan)


def _perform(session: Session, task: Task, given: Mapping[str, Any]) -> Recording:
    """Run the task; the plan, progress and summary go to stderr."""

    def tell(text: str) -> None:
        if not given["quiet"]:
            click.echo(text, err=True)

    folder: Path = given["output_dir"]
    if not given["overwrite"] and (held := api.finished_targets(task, folder)):
        tell(f"{folder}: finished already, with these inputs; nothing to do")
        return held
    if not task.plan.fits:
        tell(_plan(task) + "\n")
    api.require_fit(task.plan)
    reading = api.reading(task, given["io"])
    tell(_plan(task, reading) + "\n")
    progress = Progress(task.teacher.checkpoint.layer_bytes, tell)

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        if not given["quiet"]:
            progress(phase, done, total)

    try:
        made = api.execute_targets(
            task, folder, io=reading, device=given["device"], overwrite=given["overwrite"],
            notify=notify,
        )  # fmt: skip
    except BaseException as error:
        if session.interrupts.received is None:
            raise
        raise _kept(session.interrupts.received, task, folder, session) from error
    finally:
        progress.close()
    if made.run["io"] != reading.mode:
        tell(f"io: {reading.mode} was refused here; {made.run['io']} was used")
    tell("\n" + recording_summary(made))
    return made


def _plan(task: Task, reading: Reading | None = None) -> str:
    """The data and what is kept of each answer token, then the plan."""
    data, config = task.samples, task.config
    left_out = f"; {len(data.masked)} left out" if data.masked else ""
    kept = f"{config.top_k} of {config.rows} logits of each, float32, {len(task.shards)} files"
    rows = [
        (
            "examples",
            f"{len(data.samples)} of {data.tokens} tokens, {data.loss_tokens} of them answers, "
            f"template {data.template}{left_out}",
        ),
        ("targets", kept),
    ]
    return f"{aligned(rows)}\n{forward_plan_table(task.plan, reading)}"


def _kept(number: int, task: Task, folder: Path, session: Session) -> InterruptError:
    """What an interrupted run leaves (by the sweep's file names), and how it is continued."""
    spool, depth = folder / WORK / "spool", task.teacher.layers
    inputs = [int(path.name[6:11]) for path in tensors_of(spool).glob("input-*.sum.json")]
    written = len(list(spool.glob("logits-*.json")))
    return InterruptError(
        number,
        f"interrupted; {max(inputs, default=0)} of {depth} layers and {written} of "
        f"{len(task.shards)} files of targets are finished and kept in {folder / WORK}",
        f"continue with: {shlex.join(['pkt', *session.arguments])}",
    )
