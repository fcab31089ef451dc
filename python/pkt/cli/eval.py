"""`pkt eval`: a student, adapters on it and a teacher, side by side on the same tasks."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import aliases, debugging
from pkt.cli.options import Session
from pkt.errors import InterruptError, UsageError
from pkt.records import Evaluation, Template
from pkt.workplace import WORK

_EXAMPLE = (
    "pkt eval --model 7b --adapter out --teacher 70b --tasks loss,gsm8k@8 --data gsm8k/ -o scores"
)


@click.command(
    "eval",
    short_help="Loss and benchmarks of a model, its adapters and a teacher.",
    epilog=f"For example: {_EXAMPLE}",
)
@click.option("--model", metavar="MODEL", help="The student: folder, hub id or alias.")
@click.option(
    "--adapter", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="PEFT folder for it; may be repeated: a column each.",
)  # fmt: skip
@click.option("--teacher", metavar="MODEL", help="What the student is to come near.")
@click.option(
    "--tasks", type=click.UNPROCESSED, callback=options.names, metavar="loss,mmlu@5,…",
    help="loss, mmlu, gsm8k, gsm8k_cot, superni, alpacafarm, humaneval, mbpp; @N: N-shot. "
    "Other names are lm-eval's (from the hub).",
)  # fmt: skip
@click.option(
    "--data", multiple=True, metavar="[TASK=]PATH",
    help="Folder or file with the tasks' data, in their public formats; TASK=PATH for one task. "
    "Names and formats: pkt/data/tasks/README.md, or --data-help.",
)  # fmt: skip
@click.option("-o", "--output-dir", type=click.Path(path_type=Path), metavar="OUT",
              help="Folder of the result; an unfinished run there is continued.")  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=0), default=0, show_default=True,
    help="First so many rows of each task (subject of MMLU, task file of superni); 0: all.",
)  # fmt: skip
@click.option("--allow-code-exec", is_flag=True,
              help="Run the programs that humaneval and mbpp generate, in a sandbox.")  # fmt: skip
@click.option(
    "--template", type=click.Choice(get_args(Template)), default="auto", show_default=True,
    help="Of the texts of loss and of alpacafarm.",
)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=2), default=2048, show_default=True,
              help="Longer texts of loss are cut.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=None,
              help="Longest generation.  [default: the task's own]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Prompts of a benchmark at once.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where the models are.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              show_default=True, help="auto: each checkpoint's own.")  # fmt: skip
@click.option("--seed", type=int, default=1234, show_default=True,
              help="Of the few-shot draws; 1234 is lm-eval's.")  # fmt: skip
@click.option("--max-ram", default="auto", show_default=True, metavar="SIZE",
              help="Student and teacher must fit into it.")  # fmt: skip
@options.config
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--data-help", is_flag=True, help="Print the data formats and file names; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def evaluate(session: Session, /, **given: Any) -> None:
    """Evaluate a model, adapters on it and a teacher on the same tasks, in one table.

    The loss is the mean cross-entropy of answer tokens; with a teacher also how far the model's
    predictions are from the teacher's. Benchmarks run through lm-eval (pip install
    'pkt-llm[eval]') on local files. OUT holds results.json, results.md and every answer.
    """
    if given["data_help"]:
        click.echo(api.data_formats().rstrip())
        return
    needed = {"model": "--model", "tasks": "--tasks", "output_dir": "-o"}
    if missing := [flag for name, flag in needed.items() if not given[name]]:
        raise UsageError(f"pkt eval also needs {' and '.join(missing)}", _EXAMPLE)
    same = ("tasks", "teacher", "limit", "template", "max_tokens", "max_new_tokens", "batch_size",
            "allow_code_exec", "device", "dtype", "seed", "max_ram")  # fmt: skip
    request = api.prepare_evaluation(
        given["model"], adapters=given["adapter"], data=_places(given["data"]), aliases=aliases(),
        **{name: given[name] for name in same},
    )  # fmt: skip
    progress = _Progress(say=not given["quiet"])

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        progress(phase, done, total)

    try:
        made = api.execute_evaluation(
            request, given["output_dir"], overwrite=given["overwrite"], quiet=not debugging(),
            notify=notify,
        )  # fmt: skip
    except BaseException as error:
        if session.interrupts.received is None:
            raise
        steps = len(list((given["output_dir"] / WORK / "steps").glob("*.json")))
        raise InterruptError(
            session.interrupts.received,
            f"interrupted; {steps} finished steps are kept in {given['output_dir'] / WORK}",
            f"continue with: {shlex.join(['pkt', *session.arguments])}",
        ) from error
    finally:
        progress.close()
    click.echo(_json(made) if given["as_json"] else _table(made))


def _places(entries: tuple[str, ...]) -> Mapping[str, str] | None:
    """``PATH`` for all tasks, ``TASK=PATH`` for one."""
    found: dict[str, str] = {}
    for entry in entries:
        name, given, path = entry.partition("=")
        if not given or "/" in name or Path(entry).exists():
            name, path = "", entry
        if name in found:
            raise UsageError(f"--data {entry}: given twice for {name or 'every task'}")
        found[name] = path
    return found or None


def _table(made: Evaluation) -> str:
    table = (made.folder / "results.md").read_text(encoding="utf-8").rstrip()
    return f"{table}\n\n{made.folder}"


def _json(made: Evaluation) -> str:
    found = {
        "output_dir": str(made.folder),
        "results": made.results,
        "manifest": made.manifest,
        "run": made.run,
    }
    return json.dumps(found, indent=1)


class _Progress:
    """A bar on a terminal, a line for each finished step elsewhere, nothing if quiet."""

    def __init__(self, say: bool) -> None:
        self._say, self._terminal = say, sys.stderr.isatty()
        self._phase = ""
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self._say:
            return
        if not self._terminal:
            if done == total:
                click.echo(f"{phase}  {done}/{total}", err=True)
            return
        if phase != self._phase or self._bar is None:
            from tqdm import tqdm

            self.close()
            tqdm.monitor_interval = 0
            width = shutil.get_terminal_size((100, 24)).columns
            self._phase = phase
            self._bar = tqdm(desc=phase, total=total, file=sys.stderr, ncols=width)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar that is being drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
