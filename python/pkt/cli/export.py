"""`pkt export`: what was trained, as a LoRA of rank 2r, a merged model, or a residual base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import aliases
from pkt.cli.options import Session
from pkt.cli.tables import aligned
from pkt.config import format_bytes
from pkt.errors import InterruptError, UsageError
from pkt.records import Export

if TYPE_CHECKING:
    from pkt.methods.exporting import Task

_FOLDER = click.Path(path_type=Path)
_SHOWN = 12  # lines of the table of errors
_SERVED = 16  # the rank that vLLM serves unless told otherwise
_FORMS = {
    "lora": "a LoRA on the untouched student",
    "merged": "a complete model",
    "residual": "the student less its start, and the start as an adapter",
}


@click.command(
    short_help="A trained adapter as LoRA or merged model.",
    epilog="For example: pkt export --run tuned --to merged -o served",
)
@click.option(
    "--run", type=_FOLDER, metavar="RUN",
    help="Folder of pkt train, of pkt extract (--to residual), or any PEFT LoRA.",
)  # fmt: skip
@click.option("--to", type=click.Choice(list(_FORMS)), help="What to write.")
@click.option(
    "-o", "--output-dir", type=_FOLDER, metavar="OUT", help="A new folder for the result."
)
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="N",
    help="Recompress a lora to rank N; the error of each module is printed.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
    show_default=True, help="Of written weights; auto: as stored (merged), float32 (residual).",
)  # fmt: skip
@click.option(
    "--student", metavar="MODEL",
    help="Folder, hub id or alias of the student.  [default: as RUN names it]",
)  # fmt: skip
@click.option(
    "--extracted", type=_FOLDER, metavar="EXTRACTED",
    help="Folder of pkt extract on whose residual base RUN was trained.",
)  # fmt: skip
@options.config
@options.max_ram
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--dry-run", is_flag=True, help="Check the inputs and print the plan; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def export(session: Session, /, **given: Any) -> None:
    """Turn a trained adapter into what others load; the result is loaded back and compared.

    lora: [B | −B₀], [A ; A₀], a plain LoRA on the untouched student. merged: a complete model,
    written in blocks, in files like the student's. residual: a start taken out of its student, to
    train with TRL, axolotl or a loop of your own; `--to lora --extracted …` brings that back.
    """
    needed = ["run", "to", "output_dir"][: 2 if given["dry_run"] else 3]
    if missing := [name for name in needed if not given[name]]:
        flags = ", ".join("-o" if name == "output_dir" else f"--{name}" for name in missing)
        raise UsageError(
            f"pkt export also needs {flags}", "pkt export --run tuned --to merged -o served"
        )
    names = ("rank", "dtype", "student", "extracted", "max_ram")
    task = api.prepare_export(
        given["run"], given["to"], aliases=aliases(), **{name: given[name] for name in names}
    )
    if given["dry_run"]:
        found = {**task.identity(), "modules": len(task.places)}
        click.echo(json.dumps(found, indent=1) if given["as_json"] else _plan(task))
        return
    made = _perform(session, task, given)
    if given["as_json"]:
        found = {"output_dir": str(made.folder), "manifest": made.manifest, "run": made.run}
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(str(made.folder))


def _perform(session: Session, task: Task, given: Mapping[str, Any]) -> Export:
    """Run the task; plan, progress and summary go to stderr."""

    def tell(text: str) -> None:
        if not given["quiet"]:
            click.echo(text, err=True)

    folder: Path = given["output_dir"]
    if not given["overwrite"] and (made := api.finished_export(task, folder)):
        tell(f"{folder}: finished already, with these inputs; nothing to do")
        return made
    tell(_plan(task))
    last: tuple[str, int, int] = ("", 0, 0)  # a phase is told of when it has ended

    def notify(phase: str, done: int, total: int) -> None:
        nonlocal last
        session.interrupts.check()
        ended = [last] if last[0] not in ("", phase) and last[1] < last[2] else []
        last = (phase, done, total)
        for name, at, full in [*ended, *([last] if done == total else [])]:
            in_bytes = name.startswith(("write", "check files"))
            figures = f", {format_bytes(at)} of {format_bytes(full)}" if in_bytes else ""
            tell(name + figures)

    try:
        made = api.execute_export(task, folder, overwrite=given["overwrite"], notify=notify)
    except KeyboardInterrupt as error:
        if session.interrupts.received is None:
            raise
        raise InterruptError(
            session.interrupts.received,
            f"interrupted; what was written to {folder} is removed again",
            "the same command begins anew",
        ) from error
    tell("\n" + _summary(made))
    return made


def _plan(task: Task) -> str:
    ranks = {int(half.a.shape[0]) for half in task.changes().values()}
    rank = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(max(ranks))
    if task.rank is not None:
        rank += f", recompressed to {task.rank}"
    stored = "/".join(task.student.checkpoint.dtypes())
    rows = [
        ("to", f"{task.to}: {_FORMS[task.to]}"),
        ("student", f"{task.base_model} ({task.student.family}, {stored})"),
        ("adapter", f"{task.adapter.folder}: {len(task.places)} modules, rank {rank}"),
    ]
    if task.start:
        rows.append(("start", f"{task.start.folder}: was subtracted from the adapter's base"))
    if task.to != "lora":
        rows.append(("written as", task.dtype or f"{stored}, as stored"))
    if task.to == "residual" and task.dtype != "F32":
        rows.append(("note", "W − B₀A₀ is rounded: step 0 is the student only in float32"))
    return "plan\n" + aligned(rows, indent=2)


def _summary(made: Export) -> str:
    from pkt.methods.exporting import serving_note

    found, run, text = made.manifest, made.run, ""
    if made.errors:
        what = "recompression" if found["to"] == "lora" else f"rounding to {found['dtype']}"
        text = f"‖Δ' − Δ‖ / ‖Δ‖ by {what}\n{_errors(made.errors)}\n\n"
    check, rows = found["check"], []
    if found["to"] == "lora":
        rows.append(("rank", str(found["rank"])))
        if found["rank"] > _SERVED:
            rows.append(("serving", serving_note(found["rank"]).replace("`", "")))
        if found["options"]["rank"] is not None:
            rows.append(("error of all", f"{found['whole_error']:.3g}"))
    if found["parted"]:
        rows.append(("head", "parted from the embedding, which it was tied to"))
    if found["to"] != "lora" and found["dtype"] != "F32":
        share = f"up to {max(made.errors.values()):.2g} of a module's change"
        rows.append(("rounding", f"{share}; --dtype float32 keeps it whole"))
    kind = "max |Δlogit|" if check["compared"] == "logits" else "every tensor, difference"
    bound = f", expected at most {check['bound']:.1e}" if check["bound"] else ""
    rows += [
        ("loaded back", f"{kind} {check['difference']:.2g}{bound}"),
        ("written", format_bytes(run["bytes_written"])),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in run["seconds"].items() if v >= 0.05)),
        ("memory", f"{format_bytes(run['peak_anonymous_bytes'])} at the peak"),
    ]
    return text + aligned(rows)


def _errors(errors: Mapping[str, float]) -> str:
    ordered = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    rows = [(name, f"{error:.3g}") for name, error in ordered[:_SHOWN]]
    if more := ordered[_SHOWN:]:
        rows.append((f"… {len(more)} more, at most", f"{more[0][1]:.3g}"))
    return aligned(rows, indent=2, right=[1])
