"""`pkt extract`: from a teacher, a student and seed texts to a LoRA folder, the plan first.

Options count in this order: command line, --config, --preset, defaults.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import alias_file, aliases, processes, processes_here, stay_offline
from pkt.cli.options import Session
from pkt.cli.running import announced, perform, prepare, result_json
from pkt.cli.tables import aligned, models_table, plan_json, plan_table, seeds_line
from pkt.errors import PktError, UsageError
from pkt.models import load_tokenizer, open_model, resolve
from pkt.records import IoMode, LayerRule, Split

if TYPE_CHECKING:
    from pkt.methods.seeking import Task

#: arXiv 2310.11451's own settings: with embedding and head, and its prompt format.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "rank": 16,
        "layers": "sensitivity",
        "select": "window",
        "split": "paper",
        "template": "paper",
        "embeddings": True,
        "max_tokens": 2048,
        "limit": 32,
    }
}
_REQUIRED = {
    "teacher": ("--teacher", "70b", "the large model: folder, hub id or alias"),
    "student": ("--student", "7b", "the small model: folder, hub id or alias"),
    "seeds": ("--seeds", "seeds.jsonl", 'texts to measure with, lines like {"text": "…"}'),
    "output_dir": ("-o", "out", "a new folder for the result"),
}


def _use_preset(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    if name:
        ctx.default_map = {**PRESETS[name], **(ctx.default_map or {})}
    return name


@click.command(
    short_help="A LoRA start for a small model from a large one.",
    epilog="For example: pkt extract --teacher 70b --student 7b --seeds seeds.jsonl -o out",
)
@options.models
@click.option(
    "--seeds",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Texts whose loss is measured, one JSON object a line.",
)
@click.option(
    "-o", "--output-dir", type=click.Path(path_type=Path), metavar="OUT",
    help="Folder of the result; an unfinished run there is continued.",
)  # fmt: skip
@options.shape
@click.option(
    "--layers", type=click.Choice(get_args(LayerRule)), default="sensitivity", show_default=True,
    help="Which teacher layers are kept.",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(get_args(Split)), default="paper", show_default=True,
    help="B = UΣ, A = Vᵀ (paper), or the root of Σ in both (balanced).",
)  # fmt: skip
@options.spool
@options.template
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random strategies.")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), is_eager=True, callback=_use_preset,
    help="Defaults as a whole; paper: those of arXiv 2310.11451, with --embeddings.",
)  # fmt: skip
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
@click.option("--show-sample", is_flag=True, help="Print the first seed, its loss marked; no run.")
@click.option("--dry-run", is_flag=True, help="Print the plan; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def extract(session: Session, /, **given: Any) -> None:
    """Extract a LoRA start for the student from the teacher's most sensitive parameters.

    OUT becomes a PEFT LoRA folder; OUT/report/index.html shows what was taken. The plan is
    printed before anything is read. An interrupted run is continued by the same command.
    `torchrun --nproc-per-node N -m pkt extract …` divides the seeds among N processes.
    """
    needed = ["teacher", "student", "seeds", "output_dir"]
    if given["show_sample"]:
        needed = ["teacher", "seeds"]
    elif given["dry_run"]:
        needed = needed[:3]
    if missing := [name for name in needed if not given[name]]:
        raise _missing(given, missing)
    if given["show_sample"] or given["dry_run"]:
        stay_offline()
    process, count = processes()
    if given["show_sample"]:
        if process == 0:
            click.echo(_sample(given))
        return
    names = ("teacher", "student", "seeds", "rank", "layers", "select", "split", "targets")
    more = ("template", "embeddings", "max_tokens", "limit", "max_ram", "dtype", "seed")
    disk = {name: given[name] for name in ("spool_dir", "spool_every", "output_dir") if given[name]}
    say = not given["quiet"] and process == 0
    with announced():
        task = prepare(
            say=say, processes=count, processes_here=processes_here(), **disk,
            **{name: given[name] for name in (*names, *more)},
        )  # fmt: skip
        if given["dry_run"]:
            if process == 0:
                _dry_run(task, given)
            return
        made = perform(
            session, task, given["output_dir"], io=given["io"], device=given["device"],
            overwrite=given["overwrite"], say=say,
        )  # fmt: skip
    if process == 0:
        click.echo(result_json(made) if given["as_json"] else str(made.folder))


def _dry_run(task: Task, given: Mapping[str, Any]) -> None:
    reading = api.reading(task, given["io"], measured=False, processes_here=processes_here())
    if given["as_json"]:
        cut = sum(seed.cut for seed in task.seeds.samples)
        seeds = {**task.identity()["seeds"], "cut": cut, "longest": task.seeds.longest}
        found = {
            "plan": plan_json(task.plan),
            "seeds": seeds,
            "options": task.identity()["options"],
            "io": {"mode": reading.mode, "reason": reading.reason},
        }
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(seeds_line(task.seeds, task.seed_options["max_tokens"]))
        click.echo(plan_table(task.plan, reading))
    api.require_fit(task.plan)


def _sample(given: Mapping[str, Any]) -> str:
    from pkt.samples import read_samples, show_sample

    model = open_model(given["teacher"], aliases(), "teacher")
    tokenizer = load_tokenizer(model)
    read = read_samples(
        given["seeds"], tokenizer, template=given["template"], limit=1,
        max_tokens=given["max_tokens"], positions=model.positions,
    )  # fmt: skip
    sample = show_sample(read.samples[0], tokenizer)
    return json.dumps({"sample": sample}) if given["as_json"] else sample


def _missing(given: Mapping[str, Any], missing: list[str]) -> UsageError:
    """Say what can be said already: the teacher's plan; then every option that is missing."""
    if given["teacher"] and not given["quiet"]:
        _describe_teacher(given)
    rows = [("  " + " ".join(_REQUIRED[name][:2]), _REQUIRED[name][2]) for name in missing]
    click.echo(f"missing options, with examples:\n{aligned(rows)}\n", err=True)
    flags = [_REQUIRED[name][0] for name in missing]
    words = ["pkt", "extract"]
    for name, (flag, example, _) in _REQUIRED.items():
        words += [flag, str(given[name] or example)]
    listed = " and ".join([", ".join(flags[:-1]), flags[-1]] if flags[1:] else flags)
    return UsageError(f"pkt extract also needs {listed}", shlex.join(words))


def _describe_teacher(given: Mapping[str, Any]) -> None:
    name, table = given["teacher"], aliases()
    if (source := resolve(name, table)) != name:
        click.echo(f"alias {name}: {source}", err=True)
    stay_offline()
    shape = ("max_ram", "rank", "dtype", "select", "spool_dir", "spool_every")
    try:
        found = api.inspect(
            name, seeds=given["limit"] or 32, tokens=given["max_tokens"], aliases=table,
            **{option: given[option] for option in shape},
        )  # fmt: skip
    except UsageError:
        click.echo(
            f"{source} is neither a folder here nor in the hub's local cache. Download it, or "
            f"point the alias to your copy with a line in {alias_file()}:\n"
            f"  {name if source != name else '70b'}: /path/to/{Path(source).name}\n",
            err=True,
        )
    except PktError as error:
        click.echo(f"{error.message}\n", err=True)
    else:
        click.echo(models_table(found.teacher, None) + "\n", err=True)
        for note in found.notes:
            click.echo(f"note: {note}", err=True)
        if found.plan:
            click.echo(plan_table(found.plan) + "\n", err=True)
