"""`pkt demo`: the whole job on the built-in pair, offline: extract, train, align, evaluate.

Teacher: karpathy's stories260K (llama2.c, MIT); student: three layers trained on its stories.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import click

from pkt import api
from pkt.cli import options
from pkt.cli.align import align
from pkt.cli.eval import evaluate
from pkt.cli.extract import extract
from pkt.cli.options import Session
from pkt.cli.tables import bars
from pkt.cli.train import train
from pkt.errors import OutputError

RANK = 4  # at 16 the student's k and v would be replaced whole
#: Not tuned: a large start wants about a tenth of the rate of one that begins at zero.
RATES = {"lora": "1e-3", "tuned": "1e-4", "aligned": "3e-4"}
TRAINING = ("--rank", str(RANK), "--max-steps", "40", "--batch-size", "16", "--micro-batch", "8",
            "--dropout", "0", "--template", "none", "--no-gradient-checkpointing",
            "--device", "cpu")  # fmt: skip
PROMPT, STORY_TOKENS = "Once upon a time", 60


@click.command(short_help="The whole job on a built-in pair, offline.")
@click.option(
    "-o", "--output-dir", type=click.Path(path_type=Path), default=Path("pkt-demo"),
    show_default=True, metavar="DIR", help="Folder for the pair and the results.",
)  # fmt: skip
@options.as_json
@options.quiet
@click.pass_obj
def demo(session: Session, output_dir: Path, as_json: bool, quiet: bool) -> None:
    """Extract, train, align and evaluate on a built-in pair of tiny models: offline, two minutes.

    A start is extracted from the teacher, the student is fine-tuned from it and, beside it, as a
    plain LoRA and on the teacher's activations; then all of them are measured on stories none has
    seen, and each writes one. DIR gets the models, the stories and every result; DIR/index.html
    shows them all.
    """
    pair = unpack(output_dir)
    for words in _commands(output_dir, pair):
        _run(session, words, quiet)
    scores = json.loads((output_dir / "scores" / "results.json").read_text(encoding="utf-8"))
    adapters = {name: output_dir / name for name in RATES}
    stories = api.continuations(
        PROMPT, str(pair.student), str(pair.teacher), adapters, max_new_tokens=STORY_TOKENS
    )
    extracted = json.loads((output_dir / "start" / "pkt_manifest.json").read_text("utf-8"))
    table = (output_dir / "scores" / "results.md").read_text(encoding="utf-8").rstrip()
    page = api.write_overview(output_dir, table, stories)
    if as_json:
        found = {"output_dir": str(output_dir), "page": str(page), "stories": stories}
        click.echo(json.dumps({**found, "results": scores}, indent=1))
    else:
        click.echo(_text(extracted, table, stories, page, output_dir))


def _commands(folder: Path, pair: BuiltInPair) -> Iterator[tuple[Any, list[str]]]:
    """What a user would type, step by step."""
    models = ["--teacher", str(pair.teacher), "--student", str(pair.student)]
    start, scores = str(folder / "start"), str(folder / "scores")
    yield extract, [*models, "--seeds", str(pair.seeds), "--rank", str(RANK), "-o", start]
    data = ["--data", str(pair.train), "--eval-data", str(pair.test)]
    for name, init in (("tuned", start), ("lora", "lora")):
        words = ["--student", str(pair.student), "--init", init, *data, "--lr", RATES[name]]
        yield train, [*words, *TRAINING, "-o", str(folder / name)]
    words = [*models, *data, "--output-loss", "ce", "--lr", RATES["aligned"], *TRAINING]
    yield align, [*words, "--teacher-targets", str(folder / "said"), "-o", str(folder / "aligned")]
    adapters = [word for name in RATES for word in ("--adapter", str(folder / name))]
    words = ["--model", str(pair.student), *adapters, "--teacher", str(pair.teacher)]
    words += ["--tasks", "loss", "--data", str(pair.test), "--template", "none"]
    yield evaluate, [*words, "--device", "cpu", "-o", scores]


def _run(session: Session, step: tuple[Any, Sequence[str]], quiet: bool) -> None:
    """One command as if it had been typed; what it prints on stdout is shown in the end."""
    command, words = step
    if not quiet:
        click.echo(f"$ {shlex.join(['pkt', command.name, *words])}", err=True)
    called = Session((command.name, *words), session.interrupts)
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = [*words, *(["-q"] if quiet else [])]
        command.main(arguments, f"pkt {command.name}", standalone_mode=False, obj=called)
    if not quiet:
        click.echo("", err=True)


class BuiltInPair(NamedTuple):
    """Where the pair and its stories lie."""

    teacher: Path
    student: Path
    seeds: Path
    train: Path
    test: Path


def unpack(folder: Path) -> BuiltInPair:
    """Write the built-in pair into ``folder``; what is there already must be the same.

    Raises:
        OutputError: the folder holds anything else.

    """
    files = dict(_files(resources.files("pkt") / "data" / "demo"))
    results = {"start", "said", "scores", "index.html", *RATES}
    ours = {Path(name).parts[0] for name in files} | results
    try:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except NotADirectoryError as error:
        raise OutputError(f"{folder}: expected a folder, found a file") from error
    foreign = [name for name in found if name not in ours]
    for name, source in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() != source.read_bytes():
            foreign.append(name)
    if foreign:
        raise OutputError(
            f"{folder}: expected a new folder or the demo's own, found {', '.join(foreign[:3])}",
            "choose another with -o, or move it away",
        )
    for name, source in files.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes())
    return BuiltInPair(
        folder / "stories260k",
        folder / "stories50k",
        *(folder / f"stories_{part}.jsonl" for part in ("seeds", "train", "test")),
    )


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry


def _text(
    extracted: dict[str, Any], table: str, stories: dict[str, str], page: Path, folder: Path
) -> str:
    layers = bars(extracted["layer_scores"], extracted["layers"])
    told = [f"  {name}: {' '.join(story.split())}" for name, story in stories.items()]
    return "\n".join(
        [
            "Sensitivity of each teacher layer; the student has "
            f"{len(extracted['layers'])} layers, so as many are kept (●):",
            layers,
            "",
            "On stories that none of them has seen (tuned: from the extracted start; lora: plain;\n"
            "aligned: on the teacher's activations):",
            table,
            "",
            f"Greedy, from “{PROMPT}”:",
            *told,
            "",
            f"Pictures: {page}",
            "Your own models: the commands above, each shown after a $.",
            "",
            str(folder),
        ]
    )
