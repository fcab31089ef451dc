"""From a prepared task to its result on the terminal: plan, progress, summary, interruption.

What `pkt extract` and `pkt demo` share. Everything said here goes to stderr.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pkt import api
from pkt.cli.environment import aliases
from pkt.cli.options import Session
from pkt.cli.progress import Progress
from pkt.cli.tables import match_table, plan_table, seeds_line, summary
from pkt.errors import IncompatibleError, InterruptError, PktError
from pkt.host import memory_limit
from pkt.models import resolve
from pkt.output import WORK, finished
from pkt.records import Extraction, IoMode
from pkt.workplace import spooled

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
        return api.execute(task, folder)
    mode = reading_mode(task, io)
    tell(seeds_line(task.seeds, task.seed_options["max_tokens"]))
    tell(plan_table(task.plan, mode) + "\n")
    progress = Progress(task.teacher.checkpoint.layer_bytes, tell)

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        if say:
            progress(phase, done, total)

    try:
        made = api.execute(
            task, folder, io=mode[0], device=device, overwrite=overwrite, notify=notify
        )
    except BaseException as error:
        progress.close()
        if session.interrupts.received is None:
            raise
        raise _kept(session.interrupts.received, task, folder, session) from error
    finally:
        progress.close()
    if made.run["io"] != mode[0]:
        tell(f"io: {mode[0]} was refused by the file system; {made.run['io']} was used")
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


def reading_mode(task: Task, wanted: IoMode) -> tuple[IoMode, str]:
    """The reading mode, and why."""
    from pkt.stream import choose_io

    if wanted != "auto":
        return wanted, f"--io {wanted}"
    mode, reason = choose_io(task.teacher.checkpoint, memory_limit()[0])
    return cast(IoMode, mode), reason


def _kept(number: int, task: Task, folder: Path, session: Session) -> InterruptError:
    """What an interrupted run leaves (by the sweep's file names), and how it is continued."""
    work, depth = folder / WORK, task.teacher.layers
    spool = spooled(work)
    backward = len(list((work / "spool").glob("layer-*.json")))
    inputs = [int(path.name[6:11]) for path in spool.glob("input-*.sum.json")]
    forward = depth if backward else max(inputs, default=0)
    outside = "" if spool.is_relative_to(work) else f" and {spool}"
    return InterruptError(
        number,
        f"interrupted; {forward} of {depth} forward layers and {backward} of {depth} backward "
        f"layers are finished and kept in {work}{outside}",
        f"continue with: {shlex.join(['pkt', *session.arguments])}",
    )
