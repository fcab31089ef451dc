"""Options that several commands take, spelled once, and what a command is told of its call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from pkt.cli.interrupts import Interrupts
from pkt.config import load_yaml
from pkt.records import Select, Template

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Session:
    """One call of `pkt`."""

    arguments: tuple[str, ...]  #: as given, to print the command that continues
    interrupts: Interrupts


def names(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[str, ...] | None:
    """``q,k,v`` on the command line, or a list in a YAML file."""
    parts = value.split(",") if isinstance(value, str) else value
    if parts is None:
        return None
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
        raise click.BadParameter(f"expected names, found {value!r}", ctx, param)
    found = tuple(part.strip() for part in parts if part.strip())
    if not found:
        raise click.BadParameter("expected at least one name", ctx, param)
    return found


def _use_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path:
        known = {p.name for p in ctx.command.params if p.name} - {"config", "help", "as_json"}
        loaded = load_yaml(path, frozenset(known | {"json"}))
        if "json" in loaded:
            loaded["as_json"] = loaded.pop("json")
        for option in ctx.command.params:
            _require_kind(option, loaded.get(option.name or ""), ctx, param)
        ctx.default_map = {**(ctx.default_map or {}), **loaded}
    return path


def _require_kind(
    option: click.Parameter, value: object, ctx: click.Context, param: click.Parameter
) -> None:
    """Refuse what a YAML file may hold and a command line cannot, which click does not expect."""
    several = option.multiple or option.type is click.UNPROCESSED
    kinds: tuple[type, ...] = (str, int, float)
    if isinstance(option.type, click.types.BoolParamType):
        kinds = (bool, str)
    elif isinstance(option.type, click.Path):
        kinds = (str,)
    kinds += (list,) if several else ()
    strange = isinstance(value, float) and not math.isfinite(value)
    if value is not None and (strange or not isinstance(value, kinds)):
        name = "json" if option.name == "as_json" else (option.name or "").replace("_", "-")
        expected = "true or false" if bool in kinds else "one value"
        raise click.BadParameter(f"{name}: expected {expected}, found {value!r}", ctx, param)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several option decorators as one, in reading order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


models = together(
    click.option("--teacher", metavar="MODEL", help="Large model: folder, hub id or alias."),
    click.option("--student", metavar="MODEL", help="Small model: folder, hub id or alias."),
)

targets = click.option(
    "--targets",
    type=click.UNPROCESSED,
    callback=names,
    metavar="q,k,…",
    help="Roles (q, k, v, o, gate, up, down) or module names.  [default: all]",
)
max_ram = click.option(
    "--max-ram",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="Memory the process may hold, such as 8GiB; auto: nine tenths of what is free.",
)

shape = together(
    click.option(
        "--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapter."
    ),
    click.option(
        "--select",
        type=click.Choice(get_args(Select)),
        default="window",
        show_default=True,
        help="What is taken of a chosen matrix.",
    ),
    targets,
    click.option(
        "--embeddings/--no-embeddings",
        default=False,
        help="Extract embedding and head too (the same vocabulary is needed).",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=2),
        default=2048,
        show_default=True,
        help="Longer seeds are cut.",
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=0),
        default=32,
        show_default=True,
        help="First so many rows are the seeds; 0: all.",
    ),
    max_ram,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Computed in; auto: the teacher's own, float32 for float16.",
    ),
)


def _every(ctx: click.Context, param: click.Parameter, value: Any) -> int | None:
    """``auto`` or a number."""
    if value == "auto":
        return None
    if isinstance(value, list):
        raise click.BadParameter(f"expected one number, found {value!r}", ctx, param)
    number: int = click.IntRange(min=1).convert(value, param, ctx)
    return number


spool_dir = click.option(
    "--spool-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where hidden states and gradients lie meanwhile.  [default: OUT/.work]",
)

spool = together(
    spool_dir,
    click.option(
        "--spool-every",
        type=click.UNPROCESSED,
        callback=_every,
        default="auto",
        show_default=True,
        metavar="K",
        help="Keep every K-th layer's inputs, run the others again; auto: what the disk has "
        "room for.",
    ),
)

template = click.option(
    "--template",
    type=click.Choice(get_args(Template)),
    default="auto",
    show_default=True,
    help="How prompt and answer become one text.",
)

examples = together(
    click.option(
        "--max-tokens",
        type=click.IntRange(min=2),
        default=2048,
        show_default=True,
        help="Longer examples are cut.",
    ),
    click.option(
        "--max-examples",
        type=click.IntRange(min=0),
        default=1000,
        show_default=True,
        help="First so many training rows; 0: all.",
    ),
    template,
)

training_data = together(
    examples,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Of the student's weights; the adapter is always float32.",
    ),
)

config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    is_eager=True,
    callback=_use_config,
    help="Options as YAML, spelled as here; the command line wins.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Errors and the result only.")
