"""From a prepared task to its result on the terminal: plan, progress, summary, interruption.

What `pkt extract` and `pkt demo` share. Everything said here goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pkt import api
from pkt.cli.environment import aliases, launcher, processes, processes_here
from pkt.cli.options import Session
from pkt.cli.progress import Progress
from pkt.cli.tables import match_table, plan_table, seeds_line, summary
from pkt.errors import IncompatibleError, InterruptError, PktError
from pkt.models import resolve
from pkt.output import finished, spool_folder
from pkt.records import Extraction, IoMode
from pkt.workplace import WORK, tensors_of

if TYPE_CHECKING:
    from pkt.methods.seeking import Task


def prepare(*, say: bool, teacher: str, student: str, **rest: Any) -> Task:
    """`api.prepare` with the user's aliases; what does not fit is shown as a table first."""
    table = aliases()
    for name in (teacher, student):
        source = resolve(name, table)
        if say and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).is_dir():
            click.echo(f"{name}: {source} from the hub, or from its local cache", err=True)
    try:
        return api.prepare(teacher, student, aliases=table, **rest)
    except IncompatibleError as error:
        shape = {name: rest[name] for name in ("targets", "embeddings") if name in rest}
        try:
            found = api.inspect(teacher, student, aliases=table, **shape)
        except PktError:  # one of them alone is refused: headers have no more to say
            raise error from None
        if refused := [row for row in found.rows if not row.ok]:
            click.echo(match_table(refused), err=True)
        if found.problems:
            line = problems_line(teacher, student, found.problems)
            raise IncompatibleError(line, error.hint) from error
        raise


def problems_line(teacher: str, student: str, problems: Sequence[str]) -> str:
    """What forbids a run, in one line."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{teacher} → {student}: {problems[0]}{more}"


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Processes on other hosts, which wait for this one, are told where the block fails."""
    try:
        yield
    except BaseException:
        if processes()[1] > processes_here():
            from pkt.processes import withdraw

            withdraw()
        raise


def perform(
    session: Session,
    task: Task,
    folder: Path,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    say: bool = True,
) -> Extraction:
    """Print the plan, run the task, and print what it found and cost, all on stderr."""

    def tell(text: str) -> None:
        if say:
            click.echo(text, err=True)

    if not overwrite and finished(folder, task.identity()):
        tell(f"{folder}: finished already, with these inputs; nothing to do")
        return api.execute(task, folder, device=device)
    tell(seeds_line(task.seeds, task.seed_options["max_tokens"]))
    if task.processes > 1:
        tell(f"processes: {task.processes} share the seeds; each reads the teacher")
    if not task.plan.fits:
        tell(plan_table(task.plan) + "\n")
    api.require_fit(task.plan)
    reading = api.reading(task, io, processes_here=processes_here())
    tell(plan_table(task.plan, reading) + "\n")
    progress = Progress(task.teacher.checkpoint.layer_bytes, tell)

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        if say:
            progress(phase, done, total)

    try:
        made = api.execute(
            task, folder, io=reading, device=device, overwrite=overwrite, notify=notify
        )
    except BaseException as error:
        progress.close()
        if session.interrupts.received is None:
            raise
        raise _kept(session.interrupts.received, task, folder, session) from error
    finally:
        progress.close()
    if not made.run:  # another process speaks for all
        return made
    if made.run["io"] != reading.mode:
        tell(f"io: {reading.mode} was refused here; {made.run['io']} was used")
    tell("\n" + summary(made, task.teacher.layers))
    return made


def result_json(made: Extraction) -> str:
    """A finished run as one JSON object."""
    found = {
        "output_dir": str(made.folder),
        "report": str(made.folder / "report" / "index.html"),
        "manifest": made.manifest,
        "run": made.run,
    }
    return json.dumps(found, indent=1)


def _kept(number: int, task: Task, folder: Path, session: Session) -> InterruptError:
    """What an interrupted run leaves (by the sweep's file names), and how it is continued."""
    process, count = processes()
    if process:
        return InterruptError(number, "interrupted")
    spool, depth = spool_folder(folder / WORK, process, count), task.teacher.layers
    words = launcher()
    command = shlex.join([*words, *session.arguments]) if words else "the same command on each host"
    tensors = tensors_of(spool)
    backward = len(list(spool.glob("layer-*.json")))
    inputs = [int(path.name[6:11]) for path in tensors.glob("input-*.sum.json")]
    turned = backward or (spool / "losses.json").exists()
    forward = depth if turned else max(inputs, default=0)
    elsewhere = "" if tensors == spool else f" and {tensors}"
    return InterruptError(
        number,
        f"interrupted; {forward} of {depth} forward layers and {backward} of {depth} backward "
        f"layers are finished and kept in {folder / WORK}{elsewhere}",
        f"continue with: {command}",
    )
