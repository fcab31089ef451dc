"""`pkt train`: fine-tune the student from a start; what comes out is served as it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pkt import api
from pkt.api.distilling import LOSSES
from pkt.card import loss_unit
from pkt.cli import options
from pkt.cli.environment import aliases, processes
from pkt.cli.options import Session
from pkt.cli.pairing import ranking_table
from pkt.cli.steps import Steps
from pkt.cli.tables import aligned, format_count, resident_plan_table
from pkt.config import format_bytes
from pkt.errors import InterruptError, UsageError
from pkt.output import TUNED, finished
from pkt.records import Tuning
from pkt.workplace import WORK

if TYPE_CHECKING:
    from pkt.methods.tuning import Config, Task

SCHEDULE = (
    "lr", "lr_ratio", "epochs", "max_steps", "batch_size", "micro_batch", "warmup",
    "weight_decay", "max_grad_norm", "gradient_checkpointing", "autocast", "eval_steps", "seed",
)  # fmt: skip
_INPUTS = (
    "init", "norms_from", "eval_data", "start", "rank", "targets", "embeddings", "dropout",
    "template", "max_tokens", "max_examples", "dtype", "max_ram", "distill", "teacher_targets",
    "distill_weight", "layers", "online", "teacher", "top_k",
)  # fmt: skip
_POSITIVE = click.IntRange(min=1)
_FILE = click.Path(path_type=Path)

schedule = options.together(
    click.option("--lr", type=float, default=3e-4, show_default=True, help="Peak learning rate."),
    click.option(
        "--lr-ratio", type=float, default=1.0, show_default=True,
        help="Learning rate of B over that of A.",
    ),
    click.option("--epochs", type=float, help="[default: 3; of an objective of pkt align: 5]"),
    click.option("--max-steps", type=_POSITIVE, help="Overrides --epochs."),
    click.option(
        "--batch-size", type=_POSITIVE, default=64, show_default=True,
        help="Examples a step, over all processes.",
    ),
    click.option(
        "--micro-batch", type=_POSITIVE, default=4, show_default=True,
        help="At most so many of them at once.",
    ),
    click.option(
        "--warmup", type=float, default=0.03, show_default=True, help="Share of the steps."
    ),
    click.option("--weight-decay", type=float, default=0.0, show_default=True),
    click.option(
        "--max-grad-norm", type=float, default=1.0, show_default=True,
        help="Gradients of a step that are larger are scaled down to it.",
    ),
    click.option(
        "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True,
        help="Of the trained half's input; the frozen half has none.",
    ),
)  # fmt: skip
fitting = options.together(
    click.option("--autocast", is_flag=True, help="bfloat16 mixed precision (transformers' bf16)."),
    click.option(
        "--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True,
        help="Recompute activations: less memory, a third more time.",
    ),
    click.option(
        "--eval-steps", type=click.IntRange(min=0), default=0,
        help="Steps between held-out losses.  [default: every epoch]",
    ),
    click.option(
        "--save-steps", type=click.IntRange(min=0), default=0,
        help="Steps between checkpoints.  [default: about five minutes]",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True,
        help="Of the order of examples, dropout and random starts.",
    ),
)  # fmt: skip


@click.command(
    short_help="Fine-tune the student from a start.",
    epilog="For example: pkt train --student 7b --init out --data train.jsonl -o tuned",
)
@click.option("--student", metavar="MODEL", help="Small model: folder, hub id or alias.")
@click.option(
    "--init", default="lora", show_default=True, metavar="START",
    help="Folder that pkt extract wrote, or a control: lora, pissa, gaussian.",
)  # fmt: skip
@click.option("--data", type=_FILE, metavar="FILE.jsonl", help="Training examples.")
@click.option("--eval-data", type=_FILE, metavar="FILE.jsonl", help="Held-out examples.")
@click.option(
    "-o", "--output-dir", type=_FILE, metavar="OUT",
    help="Folder of the result; an unfinished run there is continued.",
)  # fmt: skip
@click.option(
    "--start", default="residual", show_default=True, metavar="FORM",
    help="residual (the paper's), scaled:c (the start times c), or a-only (its subspace, B = 0).",
)  # fmt: skip
@click.option(
    "--norms-from", type=_FILE, metavar="EXTRACTED",
    help="pissa and gaussian take the norms of this extraction's start.",
)  # fmt: skip
@click.option(
    "--distill", type=click.Choice(LOSSES),
    help="Learn from a teacher's logits, the largest (topk-kl) or all (kl), not from the labels.",
)  # fmt: skip
@click.option(
    "--teacher-targets", type=_FILE, metavar="DIR",
    help="These logits, as pkt align --targets-only wrote them for this data.",
)  # fmt: skip
@click.option(
    "--online", is_flag=True,
    help="With --distill: the teacher stays in memory; no targets, the same numbers.",
)  # fmt: skip
@click.option(
    "--teacher", metavar="MODEL", help="With --online: large model: folder, hub id or alias."
)
@click.option(
    "--top-k", type=_POSITIVE, metavar="K", help="With --online: logits of topk-kl.  [default: 64]"
)
@click.option(
    "--distill-weight", type=float, default=1.0, show_default=True, metavar="W",
    help="Loss: W times the divergence, 1 - W times the labels' cross-entropy.",
)  # fmt: skip
@schedule
@click.option("--rank", type=_POSITIVE, help="r.  [default: the extraction's, or 16]")
@options.targets
@click.option(
    "--embeddings/--no-embeddings", default=False, help="A control adapts embedding and head too."
)
@click.option(
    "--layers", metavar="K,…",
    help="Student layers that a control adapts, counted from 1.  [default: all]",
)  # fmt: skip
@options.training_data
@fitting
@options.config
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="auto: CUDA where present.",
)  # fmt: skip
@options.max_ram
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--show-sample", is_flag=True, help="Print the first example, its loss marked.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; no run.")
@options.as_json
@options.quiet
@click.pass_obj
def train(session: Session, /, **given: Any) -> None:
    """Fine-tune the student, starting from what pkt extract took out of a teacher.

    At step 0 the model is the student itself, which is checked; then B and A are trained on the
    answers of DATA. OUT becomes a plain PEFT LoRA on the untouched student. The same command
    continues an interrupted run. `accelerate launch -m pkt train …` uses several processes.
    """
    needed = ["student", "data", "output_dir"]
    needed = needed[:2] if given["show_sample"] or given["dry_run"] else needed
    if missing := [name for name in needed if not given[name]]:
        flags = ", ".join("-o" if n == "output_dir" else f"--{n}" for n in missing)
        raise UsageError(
            f"pkt train also needs {flags}",
            "pkt train --student 7b --init out --data train.jsonl -o tuned",
        )
    process, count = processes()
    say = not given["quiet"] and process == 0
    task = api.prepare_training(
        given["student"], given["data"], aliases=aliases(), processes=count,
        **{name: given[name] for name in (*_INPUTS, *SCHEDULE) if given[name] is not None},
    )  # fmt: skip
    if given["show_sample"]:
        click.echo(_sample(task, given["as_json"]))
        return
    if given["dry_run"]:
        click.echo(json.dumps(task.identity(), indent=1) if given["as_json"] else _plan(task))
        return
    made = perform(session, task, given, say)
    if process == 0:
        click.echo(as_json(made) if given["as_json"] else str(made.folder))


def perform(session: Session, task: Task, given: Mapping[str, Any], say: bool) -> Tuning:
    """Run the task; the plan, progress and summary go to stderr."""

    def tell(text: str) -> None:
        if say:
            click.echo(text, err=True)

    folder: Path = given["output_dir"]
    device = api.pick_device(given["device"])
    run = {"device": device, "overwrite": given["overwrite"], "save_steps": given["save_steps"]}
    identity = {**task.identity(), "device": device}
    if not given["overwrite"] and finished(folder, identity, TUNED):
        tell(f"{folder}: finished already, with these inputs; nothing to do")
        return api.execute_training(task, folder, **run)
    tell(_plan(task) + "\n")
    steps = Steps(tell, say)
    try:
        with session.interrupts.deferred() as stopping:
            made = api.execute_training(task, folder, notify=steps, stop=stopping, **run)
    except KeyboardInterrupt as error:
        if session.interrupts.received is None:
            raise
        raise InterruptError(
            session.interrupts.received,
            f"interrupted after step {steps.done}, which is kept in {folder / WORK}",
            f"continue with: {shlex.join(['pkt', *session.arguments])}",
        ) from error
    finally:
        steps.close()
    if say:
        tell("\n" + _summary(made))
        if "attribution" in made.manifest:
            tell(f"\n{ranking_table(made.manifest)}")
    return made


def _plan(task: Task) -> str:
    from pkt.training import steps_in_all

    schedule, origin = task.config.schedule, task.config.init
    left_out = f"; {len(task.samples.masked)} left out" if task.samples.masked else ""
    start = origin if origin == "lora" else f"{origin}, {task.config.form.name}"
    adapted = f", layers {', '.join(map(str, task.config.layers))}" if task.config.layers else ""
    if task.config.form.name == "scaled":
        start += f" {task.config.form.scale:g}"
    rows = [
        ("start", f"{start}, rank {task.config.rank}{adapted}"),
        (
            "examples",
            f"{len(task.samples.samples)} of {task.samples.tokens} tokens, "
            f"{task.samples.loss_tokens} in the loss, template {task.samples.template}{left_out}",
        ),
        (
            "steps",
            f"{steps_in_all(len(task.samples.samples), schedule)} of {schedule.batch_size} "
            f"examples, {schedule.lr:g} at the peak, linear decay",
        ),
    ]
    if task.config.alignment and task.teacher:
        rows += _aligned_rows(task.config, task.teacher)
    elif task.teacher:
        labels = 1 - task.config.distill_weight
        beside = f", beside {labels:g} of the labels' cross-entropy" if labels else ""
        family, layers = (task.teacher["teacher"].get(n) for n in ("family", "layers"))
        known = f"the {task.teacher['top_k']} largest logits of a {family} of {layers} layers"
        rows.append(("learns", f"{known}, {task.config.distill}{beside}"))
    if task.held_out:
        held = task.held_out
        rows.append(("held out", f"{len(held.samples)} examples, {held.loss_tokens} in the loss"))
    text = "plan\n" + aligned(rows, indent=2)
    if task.online:
        text += f"\n\nwith the teacher in memory, {resident_plan_table(task.online.plan)}"
    return text


def _aligned_rows(config: Config, teacher: Mapping[str, Any]) -> list[tuple[str, str]]:
    chosen: Mapping[str, Any] = config.alignment or {}
    pairs = ", ".join(
        f"{ours} of {theirs + mix:g}" for theirs, ours, mix in teacher.get("pairs", ())
    )
    family, layers = (teacher["teacher"].get(name) for name in ("family", "layers"))
    beside = f", beside it the output's {chosen['output_loss']}" if "output_loss" in chosen else ""
    if chosen.get("kl_weight", 1) != 1:
        beside += f", KL times {chosen['kl_weight']:g}"
    return [
        (
            "learns",
            f"{chosen['objective']} from {teacher['interface']} through {teacher['map']}{beside}",
        ),
        ("layers", f"{pairs or 'by attribution'}: of the {layers} of a {family}"),
    ]


def _summary(made: Tuning) -> str:
    found, run = made.manifest, made.run
    rows = [
        ("step 0", f"max |Δlogit| {found['step_zero']['difference']:.2g}: it is the student"),
        ("trained", f"{format_count(run['trainable_parameters'])} parameters"),
        ("loss", f"{found['loss']:.4f} {loss_unit(found['options'])} in step {found['steps']}"),
    ]
    if losses := found["eval_loss"]:
        rows.append(("held out", f"{losses['student']:.4f} → {losses['tuned']:.4f} nats a token"))
    seconds = run["seconds"]
    rows += [
        ("exported", f"loaded back: max |Δlogit| {found['export']['difference']:.2g}"),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if v >= 0.05)),
        ("memory", f"{format_bytes(run['peak_anonymous_bytes'])} at the peak"),
        ("report", str(made.folder / "report" / "index.html")),
    ]
    return aligned(rows)


def _sample(task: Task, as_json: bool) -> str:
    from pkt.samples import show_sample

    sample = show_sample(task.samples.samples[0], task.tokenizer)
    return json.dumps({"sample": sample}) if as_json else sample


def as_json(made: Tuning) -> str:
    """A finished run as one JSON object."""
    found = {"output_dir": str(made.folder), "manifest": made.manifest, "run": made.run}
    return json.dumps(found, indent=1)
