"""`pkt demo`: the main job on the built-in pair, offline, drawn as text and as a page.

Teacher: karpathy's stories260K (llama2.c, MIT); student: three layers trained on its stories.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import click

from pkt.cli import options
from pkt.cli.options import Session
from pkt.cli.running import perform, prepare, result_json
from pkt.cli.tables import bars, windows_table
from pkt.errors import OutputError
from pkt.records import Extraction

RANK = 4
SHOWN_WINDOWS = 7


@click.command(short_help="Run the main job on a built-in pair, offline.")
@click.option(
    "-o", "--output-dir", type=click.Path(path_type=Path), default=Path("pkt-demo"),
    show_default=True, metavar="DIR", help="Folder for the pair and the result.",
)  # fmt: skip
@options.as_json
@options.quiet
@click.pass_obj
def demo(session: Session, output_dir: Path, as_json: bool, quiet: bool) -> None:
    """Run `pkt extract` on a built-in pair of tiny models: offline, in under a minute.

    DIR gets both models, their story files, and the result in DIR/out.
    """
    pair = {name: str(path) for name, path in unpack(output_dir)._asdict().items()}
    words = [word for name, path in pair.items() for word in (f"--{name}", path)]
    words += ["--rank", str(RANK), "-o", str(output_dir / "out")]
    command = shlex.join(["pkt", "extract", *words])
    if not quiet:
        click.echo(f"$ {command}", err=True)
    task = prepare(say=not quiet, rank=RANK, **pair)
    made = perform(session, task, output_dir / "out", say=not quiet)
    click.echo(result_json(made) if as_json else _text(made, command))


class BuiltInPair(NamedTuple):
    """Where the pair and its seeds lie."""

    teacher: Path
    student: Path
    seeds: Path


def unpack(folder: Path) -> BuiltInPair:
    """Write the built-in pair into ``folder``; what is there already must be the same.

    Raises:
        OutputError: the folder holds anything else.

    """
    files = dict(_files(resources.files("pkt") / "data" / "demo"))
    ours = {Path(name).parts[0] for name in files} | {"out"}
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
        folder / "stories260k", folder / "stories50k", folder / "stories_seeds.jsonl"
    )


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry


def _text(made: Extraction, command: str) -> str:
    manifest, windows = made.manifest, made.manifest["windows"]
    shown = dict(islice(windows.items(), SHOWN_WINDOWS))
    layers = bars(manifest["layer_scores"], manifest["layers"])
    return "\n".join(
        [
            "Sensitivity of each teacher layer; the student has "
            f"{len(manifest['layers'])} layers, so as many are kept (●):",
            layers,
            "",
            f"Most sensitive window of each matrix ({len(shown)} of {len(windows)}):",
            windows_table(shown),
            "",
            f"Pictures: {made.folder / 'report' / 'index.html'}",
            f"The same by hand:  {command}",
            "Your own models:   pkt extract --teacher TEACHER --student STUDENT "
            "--seeds SEEDS.jsonl -o OUT",
            "",
            str(made.folder),
        ]
    )
