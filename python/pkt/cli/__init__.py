"""The command `pkt`: the only place with prints, exits, signals and environment reads.

A command turns options into a call of `pkt.api` and the records that come back into text.
Results go to stdout, all else to stderr. Every failure ends here as one line and a hint, with
the exit code of its class; PKT_DEBUG=1 adds the traceback. No command loads torch before it
must: `pkt --help` and `pkt inspect` never do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import click

import pkt
from pkt.cli.align import align
from pkt.cli.bench import bench
from pkt.cli.compare import compare
from pkt.cli.demo import demo
from pkt.cli.env import env
from pkt.cli.environment import debugging, processes, set_up
from pkt.cli.eval import evaluate
from pkt.cli.export import export
from pkt.cli.extract import extract
from pkt.cli.inspect import inspect
from pkt.cli.interrupts import Interrupts
from pkt.cli.options import Session
from pkt.cli.tables import readable
from pkt.cli.train import train
from pkt.errors import InterruptError, PktError

LONGEST = 4000  # characters of an error line
BROKEN_PIPE = 141  # as a shell says it of a process that SIGPIPE ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pkt.__version__, message="pkt %(version)s")
def commands() -> None:
    """Move knowledge from a very large language model into a small one.

    The large one may be far larger than this host's memory. Start with `pkt demo`.

    Results are on stdout, all else on stderr. Exit codes: 0 done; 1 damaged checkpoint, output
    folder or disk; 2 usage; 3 models that do not fit together; 4 does not fit the memory; 5 bad
    seeds; 130 and 143 interrupted, with the finished layers kept. PKT_DEBUG=1 shows tracebacks.
    """


for command in (inspect, extract, align, train, export, evaluate, compare, bench, env, demo):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the entry point of `pkt`.

    Args:
        arguments: without the program's name; ``None`` takes those of the process.

    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    set_up()
    with Interrupts() as interrupts, _quiet_libraries():
        try:
            session = Session(tuple(given), interrupts)
            code = commands.main(given or ["--help"], "pkt", standalone_mode=False, obj=session)
            sys.stdout.flush()
            return int(code or 0)
        except (BrokenPipeError, SystemExit):  # click exits when a pipe is broken
            _drop_output()
            return BROKEN_PIPE
        except BaseException as error:
            if debugging():
                traceback.print_exc()
            if interrupts.received is not None and not isinstance(error, InterruptError):
                hint = "the same command begins again, or continues what an earlier one has left"
                error = InterruptError(interrupts.received, "interrupted", hint)
            return _explain(error)


def _explain(error: BaseException) -> int:
    """Print what went wrong and return the exit code."""
    match error:
        case PktError():
            return _fail(error.message, error.hint, error.exit_code)
        case click.ClickException():
            hint = None
            if isinstance(error, click.UsageError) and error.ctx:
                hint = f"{error.ctx.command_path} --help"
            return _fail(_with_source(error), hint, error.exit_code)
        case KeyboardInterrupt() | click.Abort():
            return _fail("interrupted", None, 130)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or error}", None, 1)
        case MemoryError():
            return _fail("out of memory", "give a smaller --max-ram than the host has free", 1)
        case Exception() if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            remedy = "a smaller --micro-batch or --batch-size, --dtype bfloat16, or --device cpu"
            return _fail("the device is out of memory", remedy, 4)
        case RuntimeError() if "can't allocate memory" in str(error):  # torch's, of the host
            return _fail("out of memory", "give a smaller --max-ram than the host has free", 1)
        case Exception():
            text = " ".join(str(error).split())
            message = f"this is a bug in pkt: {type(error).__name__}: {text}"
            return _fail(message, "please report it; PKT_DEBUG=1 shows where it is", 1)
        case _:
            raise error


def _fail(message: str, hint: str | None, code: int) -> int:
    who = f"process {processes()[0]}: " if processes()[1] > 1 else ""
    with contextlib.suppress(BrokenPipeError):
        click.echo(f"pkt: error: {who}{readable(_clipped(message))}", err=True)
        if hint:
            click.echo(f"hint: {readable(_clipped(hint))}", err=True)
    return code


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _with_source(error: click.ClickException) -> str:
    """A bad value's message says so where it came from a file, not from the command line."""
    message = error.format_message()
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is click.core.ParameterSource.DEFAULT_MAP and error.ctx.params.get("config"):
            message = f"{error.ctx.params['config']}: {message}"
    return message


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """What libraries warn of is of their making: shown to developers only."""
    with warnings.catch_warnings():
        if not debugging():
            warnings.simplefilter("ignore")
        yield


def _drop_output() -> None:
    """Nobody reads any more: let the interpreter's last flush go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
