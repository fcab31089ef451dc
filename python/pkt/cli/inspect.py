"""`pkt inspect`: what two models are, how they fit, and the plan of a run, from headers alone.

With `--align`, the one form that loads torch, it measures instead how well maps between the two
residual streams carry what the teacher says.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from pkt import api
from pkt.cli import options
from pkt.cli.alignment import align_plan_table, alignment_json, alignment_text
from pkt.cli.environment import aliases, stay_offline
from pkt.cli.options import Session
from pkt.cli.progress import Progress
from pkt.cli.running import problems_line
from pkt.cli.tables import match_table, models_table, plan_json, plan_table, readable
from pkt.errors import IncompatibleError, UsageError
from pkt.records import Inspection, IoMode

_OF_ALIGN = (
    "map_names", "seeds", "output_dir", "fold_norm", "allow_low_coverage", "template", "seed",
    "io", "device", "overwrite", "quiet",
)  # fmt: skip
_OF_EXTRACT = ("rank", "select", "targets", "embeddings", "spool_every")

alignment = options.together(
    click.option(
        "--align", is_flag=True,
        help="Measure maps between the two residual streams: reads both models, loads torch.",
    ),
    click.option(
        "--map", "map_names", type=click.UNPROCESSED, callback=options.names, metavar="NAME,…",
        help="cosine, dual, ridge, procrustes, embedding, random, truncate.  "
        "[default: all but ridge and procrustes]",
    ),
    click.option(
        "--seeds", type=click.Path(path_type=Path), metavar="FILE.jsonl",
        help="Texts to measure with.  [default: built-in stories]",
    ),
    options.template,
    click.option(
        "--fold-norm/--no-fold-norm", default=True,
        help="Whether the final norms belong to the heads.  [default: they do]",
    ),
    click.option(
        "--allow-low-coverage", is_flag=True,
        help="Go on though the vocabularies share less than half of the smaller one.",
    ),
    click.option(
        "-o", "--output-dir", type=click.Path(path_type=Path), metavar="OUT",
        help="Folder for the report with pictures, and the maps.  [default: none are kept]",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True,
        help="Of the map random, and of the states that self-cosines are measured on.",
    ),
    click.option(
        "--io", type=click.Choice(get_args(IoMode)), default="auto", show_default=True,
        help="How files are read; auto: mapped.",
    ),
    click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
        help="Where the arithmetic is done.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT."),
)  # fmt: skip


@click.command(
    short_help="Two models, how they fit, and the plan of a run.",
    epilog="For example: pkt inspect --teacher 70b --student 7b --align -o look",
)
@options.models
@options.shape
@options.spool
@alignment
@options.as_json
@options.quiet
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    teacher: str | None,
    student: str | None,
    max_tokens: int,
    limit: int,
    as_json: bool,
    align: bool,
    **rest: Any,
) -> None:
    """Describe teacher and student, what fits what, and the plan of an extraction.

    Reads headers only; nothing is downloaded, a hub id must be in the local cache. --limit and
    --max-tokens say how many seeds of what length the plan assumes.

    With --align (and the options that stand after it) both models are read, one layer at a time,
    and the report says how well each map carries what the teacher says into the student's space:
    the state of their heads, the logits of mapped states, which layers are alike, and a map.

    Exit code 3: the models do not fit together; 4: the plan does not fit memory or disk.
    """
    if not teacher:
        raise UsageError("pkt inspect needs --teacher", "pkt inspect --teacher 70b --student 7b")
    stay_offline()
    _require_used(ctx, _OF_EXTRACT if align else _OF_ALIGN, align)
    unused = _OF_EXTRACT if align else _OF_ALIGN
    rest = {name: value for name, value in rest.items() if name not in unused}
    if align:
        if not student:
            line = "pkt inspect --teacher 70b --student 7b --align"
            raise UsageError("pkt inspect --align needs --student", line)
        rest |= {"max_tokens": max_tokens, "limit": limit}
        _align(ctx.obj, teacher, student, as_json, **rest)
        return
    found = api.inspect(
        teacher, student, seeds=limit or 32, tokens=max_tokens, aliases=aliases(), **rest
    )
    click.echo(_json(found) if as_json else _text(found))
    if found.problems:
        raise IncompatibleError(problems_line(teacher, student or "", found.problems))
    if found.plan:
        api.require_fit(found.plan)


def _align(
    session: Session,
    teacher: str,
    student: str,
    as_json: bool,
    *,
    map_names: tuple[str, ...] | None,
    output_dir: Path | None,
    io: IoMode,
    device: str,
    overwrite: bool,
    quiet: bool,
    spool_dir: Path | None,
    **rest: Any,
) -> None:
    def tell(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    task = api.prepare_quality(
        teacher, student, maps=map_names, output_dir=output_dir, spool_dir=spool_dir,
        aliases=aliases(), **rest,
    )  # fmt: skip
    tell(align_plan_table(task.plan) + "\n")
    progress = Progress(task.teacher.checkpoint.layer_bytes, tell)

    def notify(phase: str, done: int, total: int) -> None:
        session.interrupts.check()
        if not quiet:
            progress(phase, done, total)

    try:
        made = api.execute_quality(
            task, output_dir, io=io, device=device, overwrite=overwrite, spool_dir=spool_dir,
            notify=notify,
        )  # fmt: skip
    finally:
        progress.close()
    click.echo(alignment_json(made) if as_json else alignment_text(made))


def _require_used(ctx: click.Context, names: tuple[str, ...], align: bool) -> None:
    """Refuse an option that this form of the command would not look at."""
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if param.name in names and source is not ParameterSource.DEFAULT:
            form = "with --align has no" if align else "without --align has no"
            raise UsageError(f"pkt inspect {form} {param.opts[-1]}", "leave it out")


def _text(found: Inspection) -> str:
    parts = [models_table(found.teacher, found.student)]
    if found.rows:
        parts.append(match_table(found.rows))
    if found.plan:
        parts.append(plan_table(found.plan))
    if found.notes:
        parts.append("\n".join(f"note: {readable(note)}" for note in found.notes))
    if found.problems:
        parts.append("\n".join(f"problem: {readable(problem)}" for problem in found.problems))
    return "\n\n".join(parts)


def _json(found: Inspection) -> str:
    plan = plan_json(found.plan) if found.plan else None
    return json.dumps({**asdict(found), "plan": plan}, indent=1)
