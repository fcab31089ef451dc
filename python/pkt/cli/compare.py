"""`pkt compare`: arms side by side, each at its own best learning rate."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from pkt import api
from pkt import compare as comparing
from pkt.cli import options
from pkt.cli.environment import aliases
from pkt.cli.options import Session
from pkt.compare import ARMS, VARIATIONS
from pkt.errors import InterruptError, UsageError
from pkt.workplace import WORK

_FILE = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_DEFAULT_ARMS = "lora,pissa,gaussian,orthogonal,random-window,seeking,seeking-scaled,seeking-a-only"


def _numbers(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[float, ...] | None:
    """``auto``, or ``1e-4,3e-4`` (a list in a YAML file)."""
    if value in (None, "auto"):
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(
            f"expected auto or numbers, found {value!r}", ctx, param
        ) from error
    if not rates or not all(0 < rate < 10 for rate in rates):
        raise click.BadParameter(f"expected rates above 0, found {value!r}", ctx, param)
    return rates


@click.command(
    short_help="Which start helps: arms side by side, tuned alike.",
    epilog="For example: pkt compare --teacher 70b --student 7b --seeds seeds.jsonl "
    "--data train.jsonl --eval-data held.jsonl -o compared",
)
@options.models
@click.option("--seeds", type=_FILE, metavar="FILE.jsonl", help="Texts extractions measure on.")
@click.option("--data", type=_FILE, metavar="FILE.jsonl", help="Training examples.")
@click.option(
    "--eval-data", type=_FILE, metavar="FILE.jsonl",
    help="Chooses the rates; its every second row is the test, unless there is --test-data.",
)  # fmt: skip
@click.option("--test-data", type=_FILE, metavar="FILE.jsonl", help="What the result is taken on.")
@click.option("-o", "--output-dir", type=_FILE, metavar="OUT", help="Folder of the result.")
@click.option(
    "--arms", type=click.UNPROCESSED, callback=options.names, default=_DEFAULT_ARMS,
    show_default=True, metavar="a,b,…", help=f"Of: {', '.join(ARMS)}.",
)  # fmt: skip
@click.option(
    "--vary", type=click.Choice(list(VARIATIONS)),
    help="The one arm of --arms (else seeking) at several values of this.",
)  # fmt: skip
@click.option("--values", metavar="a,b,…", help="Of --vary (targets: groups with ';').")
@click.option(
    "--lrs", type=click.UNPROCESSED, callback=_numbers, default="auto", show_default=True,
    metavar="auto|a,b,…", help="Grid to begin with; it grows where the best lies at an edge.",
)  # fmt: skip
@click.option("--repeats", type=_POSITIVE, default=3, show_default=True, help="Seeds an arm.")
@click.option("--steps", type=_POSITIVE, help="Of each run.  [default: 3 epochs]")
@click.option("--rank", type=_POSITIVE, default=16, show_default=True, help="r of every arm.")
@options.targets
@click.option("--embeddings/--no-embeddings", default=False, help="Embedding and head too.")
@click.option("--batch-size", type=_POSITIVE, default=64, show_default=True)
@click.option("--micro-batch", type=_POSITIVE, default=4, show_default=True)
@click.option(
    "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
    help="0: on the trained half alone it is noise of the start's size.",
)  # fmt: skip
@options.training_data
@click.option(
    "--limit", type=click.IntRange(min=0), default=32, show_default=True,
    help="First so many seeds; 0: all.",
)  # fmt: skip
@click.option("--norms-from", type=_FILE, metavar="EXTRACTED", help="Norms of pissa and gaussian.")
@options.config
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@options.max_ram
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@options.as_json
@options.quiet
@click.pass_obj
def compare(session: Session, /, **given: Any) -> None:
    """Train every arm at its own best learning rate, and say which start helps.

    Rates are chosen on validation data, results taken on test data, over several random seeds;
    each arm is put against the best one that has seen nothing of the teacher. Finished runs are
    kept: the same command continues.
    """
    needed = ("teacher", "student", "seeds", "data", "eval_data", "output_dir")
    if missing := [name for name in needed if not given[name]]:
        flags = ["-o" if n == "output_dir" else f"--{n.replace('_', '-')}" for n in missing]
        raise UsageError(f"pkt compare also needs {', '.join(flags)}", "pkt compare --help")
    say = not given["quiet"]

    def report(cell: comparing.Cell) -> None:
        if say:
            click.echo(
                f"{cell.arm}  rate {cell.rate:g}  repeat {cell.repeat}  "
                f"validation {cell.validation:.4f}  {cell.seconds:.0f} s",
                err=True,
            )

    train = {n: given[n] for n in ("batch_size", "micro_batch", "dropout", "max_tokens")}
    train |= {n: given[n] for n in ("max_examples", "template", "dtype", "rank", "max_ram")}
    train |= {"targets": given["targets"], "embeddings": given["embeddings"]}
    if given["steps"]:
        train["max_steps"] = given["steps"]
    extract = {n: given[n] for n in ("rank", "targets", "embeddings", "template", "limit")}
    extract |= {n: given[n] for n in ("max_tokens", "max_ram")}
    try:
        with session.interrupts.deferred() as stopping:
            made = comparing.compare(
                given["teacher"], given["student"], given["seeds"], given["data"],
                given["eval_data"], given["output_dir"], arms=_arms(given),
                test_data=given["test_data"], lrs=given["lrs"], repeats=given["repeats"],
                extract=extract, train=train, norms_from=given["norms_from"],
                device=api.pick_device(given["device"]), overwrite=given["overwrite"],
                aliases=aliases(), report=report, stop=stopping,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        if session.interrupts.received is None:
            raise
        raise InterruptError(
            session.interrupts.received,
            f"interrupted; finished runs are kept in {given['output_dir'] / WORK}",
            f"continue with: {shlex.join(['pkt', *session.arguments])}",
        ) from error
    if given["as_json"]:
        click.echo(json.dumps({"output_dir": str(made.folder), **made.found}, indent=1))
        return
    click.echo(comparing.table(made.found))
    click.echo(f"\n{made.folder}")


def _arms(given: dict[str, Any]) -> list[comparing.Arm]:
    if not given["vary"]:
        if given["values"]:
            raise UsageError("--values: only with --vary")
        return comparing.chosen(given["arms"])
    source = click.get_current_context().get_parameter_source("arms")
    chosen = source is not click.core.ParameterSource.DEFAULT
    if chosen and len(given["arms"]) > 1:
        raise UsageError("--vary: expected one arm in --arms", "one arm varies at a time")
    arm = comparing.chosen(given["arms"] if chosen else ["seeking"])[0]
    split = ";" if given["vary"] == "targets" else ","
    values = [v.strip() for v in given["values"].split(split)] if given["values"] else None
    return comparing.varied(arm, given["vary"], values)
