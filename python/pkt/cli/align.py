"""`pkt align`: SEMALIGN; `--targets-only`: what the teacher says and thinks of the data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from pkt import api
from pkt.api.supervising import OBJECTIVES
from pkt.cli import options
from pkt.cli.environment import aliases, processes, stay_offline
from pkt.cli.options import Session
from pkt.cli.pairing import pairing_table, ranking_table, states_rows
from pkt.cli.progress import Progress
from pkt.cli.tables import (
    aligned,
    forward_plan_table,
    plan_json,
    recording_summary,
    resident_plan_table,
)
from pkt.cli.train import SCHEDULE, as_json, fitting, perform, schedule
from pkt.errors import InterruptError, UsageError
from pkt.records import IoMode, Reading, Recording
from pkt.workplace import WORK, tensors_of

if TYPE_CHECKING:
    from pkt.methods.targeting import Task

_FILE = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_READ = ("template", "max_tokens", "max_examples", "dtype", "max_ram", "spool_dir")
_STATES = (
    "top_k", "pairs", "critical", "interpolate", "pair_by", "interface", "map", "states_dtype",
    "attribution", "attribution_examples", "fold_norm", "seed", "allow_low_coverage",
)  # fmt: skip
_LEARNT = ("objective", "output_loss", "kl_weight", "teacher_targets", "online")
_TRAINED = ("eval_data", "init", "rank", "dropout", *SCHEDULE)


_states = options.together(
    click.option("--states", is_flag=True, help="Write mapped activations of the teacher too."),
    click.option(
        "--interface", type=click.Choice(["mlp", "attn", "block", "hidden", "span"]),
        help="Which activation: what a sub-layer adds, what the layer does, the state behind it, "
        "or that less the state of the pair below.  [default: the objective's; hidden]",
    ),
    click.option(
        "--map",
        type=click.Choice(
            ["cosine", "dual", "ridge", "procrustes", "flex", "embedding", "random", "truncate"]
        ),
        help="What carries them over to the student; ridge, procrustes and flex are fitted on "
        "activations of each pair.  [default: the objective's; dual]",
    ),
    click.option(
        "--pairs", metavar="T:S,…", help="Teacher and student layers, from 1; default: by a rule."
    ),
    click.option(
        "--critical", type=click.IntRange(min=0), metavar="N",
        help="Only the pairs that the N teacher layers of highest attribution lead to; 0: every "
        "layer.  [default: 1 of v1, else 0]",
    ),
    click.option("--interpolate", is_flag=True, help="States between two teacher layers."),
    click.option(
        "--pair-by", type=click.Choice(["floor", "attribution"]),
        help="One teacher layer for each of the student's: evenly, or of each stretch between "
        "these the one of highest attribution.  [default: attribution of v2 and acl, else floor]",
    ),
    click.option(
        "--attribution", type=click.Choice(["signed", "abs"]), default="signed", show_default=True,
        help="Gradient times activation: absolute value of the sum, or of each element.",
    ),
    click.option(
        "--attribution-examples", type=click.IntRange(min=1), default=32, show_default=True,
        metavar="N", help="First rows that are attributed, and that maps are fitted on.",
    ),
    click.option(
        "--states-dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
        default="bfloat16", show_default=True, help="Activations are stored in.",
    ),
    click.option(
        "--fold-norm/--no-fold-norm", default=True, show_default=True,
        help="Whether the final norms belong to the heads that the map is made from.",
    ),
    click.option(
        "--allow-low-coverage", is_flag=True,
        help="Accept vocabularies that share less than half of the smaller one.",
    ),
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
    "--objective", type=click.Choice(list(OBJECTIVES)), default="v1", show_default=True,
    help="v1 (the paper's: cosines), v2 (geometry of tokens), acl (Fisher-weighted logits): our "
    "reading of two abstracts; hidden-mse: a control.",
)  # fmt: skip
@click.option(
    "--output-loss", type=click.Choice(["cosine", "ce", "kl"]),
    help="Beside the layer loss of v1 and hidden-mse.  [default: cosine; ce]",
)  # fmt: skip
@click.option(
    "--kl-weight", type=float, metavar="β", help="Of the KL to the teacher.  [default: 1]"
)
@click.option(
    "--teacher-targets", type=_FILE, metavar="DIR",
    help="Where the teacher's side is written, or lies already.  [default: OUT.targets]",
)  # fmt: skip
@click.option(
    "--targets-only", is_flag=True,
    help="Write targets to OUT, for pkt train --teacher-targets; nothing is trained.",
)  # fmt: skip
@click.option(
    "--online", is_flag=True,
    help="The teacher stays in memory while the student trains: no targets, the same numbers.",
)  # fmt: skip
@click.option("--eval-data", type=_FILE, metavar="FILE.jsonl", help="Held-out examples.")
@click.option(
    "--top-k", type=click.IntRange(min=0), default=api.TOP_K, show_default=True,
    help="Logits kept of each answer token; 0: those of the whole vocabulary.",
)  # fmt: skip
@_states
@click.option(
    "--init", default="lora", show_default=True, metavar="START", help="lora, pissa or gaussian."
)
@schedule
@click.option("--rank", type=_POSITIVE, default=16, show_default=True, help="r.")
@options.targets
@fitting
@options.examples
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
    show_default=True,
    help="Of the teacher's arithmetic and the student's weights; auto: each model's own.",
)  # fmt: skip
@options.max_ram
@options.spool_dir
@options.config
@click.option(
    "--io", type=click.Choice(get_args(IoMode)), default="auto", show_default=True,
    help="How the teacher's files are read.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="cpu", show_default=True,
    help="Where the arithmetic is done; auto: CUDA where present.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def align(session: Session, /, **given: Any) -> None:
    """Train the student on the teacher's activations, carried over by the bases of both heads.

    First the teacher is read, layer by layer; it need not fit in memory. What it says at the answer
    tokens of DATA, and what paired layers think there, mapped to the student's width, is written to
    OUT.targets, for this and any further run. Then LoRA on the paired layers learns from it; OUT
    becomes a plain PEFT adapter. The same command continues an interrupted run.

    With --online it is one run: the teacher stays in memory, and nothing of it is written.

    With --targets-only OUT gets the teacher's side alone, for pkt train --distill topk-kl
    --teacher-targets OUT: its largest logits, and with --states its activations. Where the
    tokenizers differ, activations are all there is, at places where both end together. Layers
    chosen by attribution cost two more readings of the teacher, over the first examples.
    """
    needed = ["teacher", "student", "data", *([] if given["dry_run"] else ["output_dir"])]
    if missing := [name for name in needed if not given[name]]:
        flags = ", ".join("-o" if n == "output_dir" else f"--{n}" for n in missing)
        raise UsageError(f"pkt align also needs {flags}", "pkt align --help")
    if given["dry_run"]:
        stay_offline()
    if given["targets_only"]:
        _write_targets(session, given)
    else:
        _train(session, given)


def _write_targets(session: Session, given: Mapping[str, Any]) -> None:
    _require_unused(("targets", "save_steps", *_LEARNT, *_TRAINED), "--targets-only")
    if processes()[1] > 1:
        raise UsageError(
            "pkt align --targets-only runs in one process", "start it without torchrun"
        )
    names = ("states", "output_dir", *_READ, *_STATES)
    task = api.prepare_targets(
        given["teacher"], given["student"], given["data"], aliases=aliases(),
        **{name: given[name] for name in names if given[name] is not None},
    )  # fmt: skip
    if given["dry_run"]:
        _dry_run(task, given)
        return
    made = _perform(session, task, given["output_dir"], given)
    if given["as_json"]:
        found = {"output_dir": str(made.folder), "manifest": made.manifest, "run": made.run}
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(str(made.folder))


def _train(session: Session, given: Mapping[str, Any]) -> None:
    process, count = processes()
    say = not given["quiet"] and process == 0

    def tell(rows: list[dict[str, Any]]) -> None:
        if say:
            click.echo(f"\n{pairing_table(rows)}\n", err=True)

    names = (*_READ, *_LEARNT, *_TRAINED)
    made = api.prepare_align(
        given["teacher"], given["student"], given["data"], given["output_dir"] or "OUT",
        states={name: given[name] for name in _STATES}, modules=given["targets"],
        aliases=aliases(), processes=count, io=given["io"], paired=tell,
        **{name: given[name] for name in names if given[name] is not None},
    )  # fmt: skip
    if given["dry_run"]:
        _dry_run(made.targets, given)
        return
    if made.targets.resident:
        if say and (pairs := _known_pairs(made.targets)):
            tell(pairs)
    elif count == 1:
        _perform(session, made.targets, made.folder, given)
    elif not api.finished_targets(made.targets, made.folder):
        raise UsageError(
            f"pkt align in {count} processes: expected finished targets, found none in "
            f"{made.folder}",
            "start it in one process until they are written, then again like this",
        )
    if say and not made.targets.resident:
        click.echo("", err=True)
    tuned = perform(session, made.trained(), given, say)
    if process == 0:
        click.echo(as_json(tuned) if given["as_json"] else str(tuned.folder))


def _require_unused(names: Sequence[str], beside: str) -> None:
    """Refuse options that were given and would change nothing."""
    context = click.get_current_context()
    unset = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    for name in names:
        if context.get_parameter_source(name) not in unset:
            raise UsageError(f"--{name.replace('_', '-')}: not used with {beside}", "leave it out")


def _dry_run(task: Task, given: Mapping[str, Any]) -> None:
    reading = api.reading(task, given["io"], measured=False)
    if given["as_json"]:
        identity = task.identity()
        found = {
            "plan": plan_json(task.plan),
            "data": {**identity["data"], "longest": task.samples.longest},
            "options": identity["options"],
            "states": identity.get("states"),
            "pairs": _known_pairs(task),
            "io": {"mode": reading.mode, "reason": reading.reason},
        }
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(_plan(task, reading))
    if task.resident:
        api.require_both_fit(task.plan, api.pick_device(given["device"]))
    else:
        api.require_fit(task.plan)


def _perform(session: Session, task: Task, folder: Path, given: Mapping[str, Any]) -> Recording:
    """Write the targets; the plan, progress and summary go to stderr."""

    def tell(text: str) -> None:
        if not given["quiet"]:
            click.echo(text, err=True)

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
            task, folder, io=reading, device=api.pick_device(given["device"]),
            overwrite=given["overwrite"], notify=notify,
            paired=lambda rows: tell(f"\n{pairing_table(rows)}\n"),
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
    if "attribution" in made.manifest:
        tell(f"\n{ranking_table(made.manifest)}\n{made.folder / 'report' / 'index.html'}")
    return made


def _plan(task: Task, reading: Reading | None = None) -> str:
    """The data and what is kept of each answer token, then the plan."""
    data, config = task.samples, task.config
    left_out = f"; {len(data.masked)} left out" if data.masked else ""
    kept = f"{config.top_k} of {config.rows} logits of each, float32, {len(task.shards)} files"
    if task.resident:
        kept = "made when they are learnt from; the teacher stays in memory"
    if not config.top_k:
        kept = "no logits: the tokenizers differ"
    rows = [
        (
            "examples",
            f"{len(data.samples)} of {data.tokens} tokens, {data.loss_tokens} of them answers, "
            f"template {data.template}{left_out}",
        ),
        ("targets", kept),
    ]
    pairs = _known_pairs(task)
    if task.states:
        rows += states_rows(task)
    text = aligned(rows)
    if pairs:
        text += f"\n\n{pairing_table(pairs)}\n"
    table = resident_plan_table if task.resident else forward_plan_table
    return f"{text}\n{table(task.plan, reading)}"


def _known_pairs(task: Task) -> list[dict[str, Any]] | None:
    """The pairs, where no attribution has to find them."""
    from pkt.methods.targeting import pair_rows

    if not task.states or task.states.pairs is None:
        return None
    return pair_rows(task, task.states.pairs)


def _kept(number: int, task: Task, folder: Path, session: Session) -> InterruptError:
    """What an interrupted run leaves (by the sweep's file names), and how it is continued."""
    spool, depth = folder / WORK / "spool", task.teacher.layers
    inputs = [int(path.name[6:11]) for path in tensors_of(spool).glob("input-*.sum.json")]
    written = sum(len(list(spool.glob(f"{kind}-*.json"))) for kind in ("logits", "states"))
    attributed = len(list((folder / WORK / "attribution").glob("layer-*.json")))
    first = f"the attribution of {attributed}, " if attributed else ""
    whole = "" if task.states else f"of {len(task.shards)} "
    return InterruptError(
        number,
        f"interrupted; {first}{max(inputs, default=0)} of {depth} layers and {written} {whole}"
        f"files of targets are finished and kept in {folder / WORK}",
        f"continue with: {shlex.join(['pkt', *session.arguments])}",
    )
