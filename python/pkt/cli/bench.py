"""`pkt bench`: what this host gives, and how long an extraction will take on it.

Temporary files are gone when a command ends, by Ctrl-C too.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import aliases, stay_offline
from pkt.cli.options import Session
from pkt.cli.tables import aligned, duration, kept_inputs, plan_json, seeds_line
from pkt.config import format_bytes, parse_bytes
from pkt.errors import IncompatibleError, UsageError
from pkt.host import describe
from pkt.models import Model, open_model
from pkt.records import IoMode, SampleSet

if TYPE_CHECKING:
    from pkt.bench import Prediction, ReadRates
    from pkt.methods.seeking import Task

_teacher = click.option(
    "--teacher", metavar="MODEL", help="Folder, hub id or alias, whose shapes or files are taken."
)
_folder = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="For temporary files.  [default: the system's]",
)


@click.group(
    invoke_without_command=True, short_help="What this host gives, and how long a run will take."
)
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Measure reading, scoring, window search and products on this host; forecast a run.

    Run it on a quiet machine: what others use is missing in the figures.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@bench.command(short_help="The disk, and the three ways to read it.")
@_teacher
@_folder
@click.option(
    "--size", default="1GiB", show_default=True, metavar="SIZE",
    help="Of the temporary file that is read where no --teacher is given.",
)  # fmt: skip
@options.as_json
def read(teacher: str | None, folder: Path | None, size: str, as_json: bool) -> None:
    """Read cold stretches by eight threads: plain, and as `--io` mmap, buffered and direct do.

    Of a teacher, stretches spread over its files, which the page cache forgets for it; holes of
    sparse files are left out.
    """
    from pkt.bench import bench_read, files_of, temporary_file

    with contextlib.ExitStack() as stack:
        if teacher:
            files = files_of(_open(teacher).checkpoint)
        else:
            wanted = parse_bytes(size)
            if wanted < 1:
                raise UsageError(f"--size {size}: expected 1 byte or more")
            files = tuple(stack.enter_context(temporary_file(folder, wanted)))
        found = bench_read(files)
    if as_json:
        _print_json({"rates": _rates_json(found), "best_raw": found.best_raw})
    else:
        click.echo(_rates_text(found))


@bench.command(short_help="Scoring beside copying memory.")
@_teacher
@click.option(
    "--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of the seed."
)
@options.as_json
def score(teacher: str | None, tokens: int, as_json: bool) -> None:
    """Score one matrix for one seed: |w·g| alone, and with g made from X and dY.

    The matrix is the teacher's largest, or 4096 × 11008; weights are random bfloat16.
    """
    from pkt.bench import bench_score

    shape = _largest(_open(teacher)) if teacher else None
    found = bench_score(shape, tokens=tokens) if shape else bench_score(tokens=tokens)
    if as_json:
        _print_json({**asdict(found), "share_of_copy": found.share_of_copy})
        return
    rows = [
        ("matrix", f"{found.rows} × {found.columns}, bfloat16, a seed of {tokens} tokens"),
        ("copy", f"{found.copy_gigabytes_per_second:.1f} GB/s, read and written"),
        (
            "fused |w·g|",
            f"{found.fused_gigaparameters_per_second:.2f} G parameters/s, "
            f"{found.fused_gigabytes_per_second:.1f} GB/s, {found.share_of_copy:.2f} of the copy",
        ),
        (
            "dYᵀX made",
            f"{found.made_gigaparameters_per_second:.2f} G parameters/s, scored; "
            f"{found.made_teraflops:.3f} TFLOP/s",
        ),
    ]
    click.echo(aligned(rows))


@bench.command(short_help="The window search, and products.")
@_teacher
@click.option(
    "--square", type=click.IntRange(min=1), default=4096, show_default=True,
    help="Side of the matrices that are multiplied.",
)  # fmt: skip
@options.as_json
def window(teacher: str | None, square: int, as_json: bool) -> None:
    """Find the best window of half of either side, and multiply square matrices.

    The matrix is the teacher's largest, or 8192 × 8192.
    """
    from pkt.bench import bench_window

    shape = _largest(_open(teacher)) if teacher else None
    found = bench_window(shape, square=square) if shape else bench_window(square=square)
    if as_json:
        _print_json(asdict(found))
        return
    window = f"{found.window_rows} × {found.window_columns} of {found.rows} × {found.columns}"
    products = [
        (f"product, {p.dtype}", f"{p.teraflops:.3f} TFLOP/s, {p.size}²") for p in found.matmul
    ]
    click.echo(aligned([("best window", f"{found.seconds:.4f} s, {window}"), *products]))


@bench.command(short_help="How long an extraction will take.")
@options.models
@click.option(
    "--seeds",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="The run's seeds.  [default: --limit seeds of --max-tokens tokens are assumed]",
)
@options.shape
@options.spool
@options.template
@click.option(
    "--io", type=click.Choice(get_args(IoMode)), default="auto", show_default=True,
    help="How the run will read the teacher.",
)  # fmt: skip
@_folder
@options.as_json
@options.quiet
@click.pass_obj
def extract(session: Session, /, **given: Any) -> None:
    """Forecast `pkt extract`, phase by phase, and say what binds it.

    Two layers of the teacher's shape are swept with random weights, one window of each shape is
    factorized, and the disk is read for a few seconds; headers are enough, as of sparse files.
    Takes the memory of the run itself, and about a minute for a 70B teacher. From a cold start,
    on the CPU, in one process.
    """
    if missing := [f"--{name}" for name in ("teacher", "student") if not given[name]]:
        hint = "pkt bench extract --teacher 70b --student 7b --seeds seeds.jsonl"
        raise UsageError(f"pkt bench extract needs {' and '.join(missing)}", hint)
    stay_offline()
    task = _prepare(given)
    from pkt.bench import predict

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        if not given["quiet"]:
            click.echo(f"measured: {phase} {done}/{total}", err=True)

    if not given["quiet"]:
        click.echo(seeds_line(task.seeds, given["max_tokens"]), err=True)
    found = predict(task, io=given["io"], folder=given["folder"], notify=notify)
    if given["as_json"]:
        _print_json(_prediction_json(task, found))
    else:
        click.echo(_prediction_text(task, found))


def _prepare(given: dict[str, Any]) -> Task:
    names = ("rank", "select", "targets", "embeddings", "max_tokens", "limit", "max_ram", "dtype")
    rest = {name: given[name] for name in (*names, "template", "spool_dir", "spool_every")}
    seeds: Path | SampleSet | None = given["seeds"]
    if seeds is None:
        from pkt.bench import assumed_seeds

        model = _open(given["teacher"])
        tokens = min(given["max_tokens"], model.positions or given["max_tokens"])
        if tokens < 2:
            raise UsageError(
                f"seeds of {tokens} token have no loss", "assume --max-tokens 2 or more"
            )
        seeds = assumed_seeds(given["limit"] or 32, tokens, model.embedding.shape[0])
    return api.prepare(given["teacher"], given["student"], seeds, aliases=aliases(), **rest)


def _open(name: str) -> Model:
    stay_offline()
    return open_model(name, aliases(), "teacher")


def _largest(model: Model) -> tuple[int, int]:
    """The shape of the largest matrix in a decoder layer."""
    shapes = [p.shape for p in model.checkpoint.layers[0].values() if len(p.shape) == 2]
    if not shapes:
        raise IncompatibleError(f"{model.folder}: layer 0 holds no matrix")
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows, columns


def _print_json(found: dict[str, Any]) -> None:
    click.echo(json.dumps({**found, "host": describe()}, indent=1))


def _rates_json(found: ReadRates) -> dict[str, dict[str, float]]:
    return {
        name: {
            "gigabytes_per_second": rate.gigabytes_per_second,
            "of_best_raw": found.share(name),
            "processor_seconds_per_gigabyte": rate.processor_seconds / max(rate.bytes, 1) * 1e9,
            "bytes": rate.bytes,
        }
        for name, rate in found.rates.items()
    }


def _rates_text(found: ReadRates) -> str:
    rows = [("", "GB/s", "of the best raw", "processor s/GB", "read")]
    rows += [
        (
            name,
            f"{each['gigabytes_per_second']:.2f}",
            f"{each['of_best_raw']:.2f}",
            f"{each['processor_seconds_per_gigabyte']:.2f}",
            format_bytes(each["bytes"]),
        )
        for name, each in _rates_json(found).items()
    ]
    return aligned(rows, right=[1, 2, 3, 4])


def _prediction_json(task: Task, found: Prediction) -> dict[str, Any]:
    return {
        "teacher": task.teacher.name,
        "student": task.student.name,
        "seconds": found.forecast.seconds,
        "bound": found.forecast.bound,
        "phases": [asdict(phase) for phase in found.forecast.phases],
        "limit_seconds": found.limit_seconds,
        "work": {
            **asdict(found.work),
            **{name: getattr(found.work, name) for name in ("again", "flop", "scored")},
        },
        "pace": asdict(found.pace),
        "io": asdict(found.reading),
        "rates": _rates_json(found.rates),
        "own_file": found.own_file,
        "sampled_tokens": found.sampled_tokens,
        "teraflops": found.teraflops,
        "copy_gigabytes_per_second": found.copy_gigabytes_per_second,
        "plan": plan_json(task.plan),
    }


def _prediction_text(task: Task, found: Prediction) -> str:
    work, pace = found.work, found.pace
    ahead = "ahead" if work.slots > 1 else "in turn"
    where = "a temporary file" if found.own_file else "the teacher's files"
    rows = [
        ("io", f"{found.reading.mode}: {found.reading.reason}"),
        ("disk", f"{pace.read / 1e9:.2f} GB/s; best raw {found.rates.best_raw:.2f}; of {where}"),
        ("product", f"{found.teraflops:.3f} TFLOP/s, large and square, {task.config.dtype}"),
        ("copy", f"{found.copy_gigabytes_per_second:.1f} GB/s, read and written"),
        (
            "a layer",
            f"forward {pace.forward:.2f} s, backward {pace.backward:.2f} s, "
            f"as {found.sampled_tokens} of {work.tokens} tokens took",
        ),
        ("to read", f"{format_bytes(work.read_bytes)}, {ahead}"),
        ("layer inputs kept", kept_inputs(task.plan)),
        ("limit", f"{duration(found.limit_seconds)}: raw disk, product and copy at full rate"),
    ]
    head = ("phase", "time", "disk", "cores")
    phases = [
        (p.name, duration(p.seconds), duration(p.disk), duration(p.arithmetic))
        for p in found.forecast.phases
    ]
    total = found.forecast.seconds
    line = f"{task.teacher.name}: {duration(total)}, bound by {found.forecast.bound}"
    return f"{aligned(rows)}\n\n{aligned([head, *phases], right=[1, 2, 3])}\n\n{line}"
