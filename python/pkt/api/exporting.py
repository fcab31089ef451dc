"""`pkt.export`: a trained adapter as LoRA or merged model, a start as residual base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pkt.api.choices import base_name, budget
from pkt.config import load_aliases
from pkt.errors import IncompatibleError, UsageError
from pkt.models import Model, open_model
from pkt.records import Export

if TYPE_CHECKING:
    from pkt.adapter import Adapter
    from pkt.methods.exporting import Task

Notify = Callable[[str, int, int], None]

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_RESULTS = {
    "lora": ("adapter_config.json", "adapter_model.safetensors"),
    "merged": ("config.json",),
    "residual": ("base", "adapter"),
}


def prepare_export(
    run: str | Path,
    to: str,
    *,
    rank: int | None = None,
    dtype: str = "auto",
    student: str | None = None,
    extracted: str | Path | None = None,
    max_ram: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Task:
    """Open everything an export needs; of the student, headers alone.

    Args:
        run: folder of `pkt train`, of `pkt extract` (to residual), or any PEFT LoRA.
        to: lora, merged or residual.
        rank: of a lora: recompress to it.
        dtype: of written weights: auto (merged: as stored; residual: float32), float32,
            bfloat16 or float16.
        student: folder, hub id or alias; ``None``: the one that the adapter names.
        extracted: folder of `pkt extract` on whose residual base ``run`` was trained.
        max_ram: what checking the result may hold; ``None`` asks the host.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        PktError: and its subclasses, for each input that cannot be used.

    """
    from pkt.methods.exporting import Form, Task, open_architecture

    if to not in get_args(Form):
        raise UsageError(f"--to {to}: expected one of {', '.join(get_args(Form))}")
    if dtype != "auto" and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: expected auto, {', '.join(_DTYPES)}")
    if rank is not None and (to != "lora" or rank < 1):
        raise UsageError(
            f"--rank {rank}: expected 1 or more" if rank < 1 else f"--rank: not with --to {to}",
            "--rank recompresses an adapter: --to lora",
        )
    if to == "lora" and dtype != "auto":
        raise UsageError(f"--dtype {dtype}: an adapter is written in float32", "leave it out")
    adapter, start = _inputs(Path(run), to, Path(extracted) if extracted else None)
    model, name = _student(student, start or adapter, aliases)
    for option, folder in (("--run", adapter), ("--extracted", start)):
        if folder:
            _require_same_student(option, folder, model)
    architecture = open_architecture(model)
    sources = {"--run": adapter, **({"--extracted": start} if start else {})}
    places = architecture.places(sources)
    kept = "F32" if to == "residual" else None
    form: Any = to
    return Task(
        form, adapter, start, model, architecture, places, rank, _DTYPES.get(dtype, kept), name,
        budget(max_ram)[0],
    )  # fmt: skip


def execute_export(
    task: Task,
    folder: Path,
    *,
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Export:
    """Run what `prepare_export` made; a finished export of the same inputs is returned."""
    from pkt.methods import exporting

    if not overwrite and (made := finished_export(task, folder)):
        return made
    return exporting.run(task, folder, overwrite=overwrite, notify=notify)


def finished_export(task: Task, folder: Path) -> Export | None:
    """The export that ``folder`` holds, if it is of this very task and complete."""
    from pkt.output import finished

    manifest = finished(folder, task.identity(), _RESULTS[task.to])
    if manifest is None or not all((folder / name).exists() for name in manifest["files"]):
        return None
    record = json.loads((folder / "pkt_run.json").read_text(encoding="utf-8"))
    return Export(folder, manifest, record)


def export(
    run: str | Path,
    to: str,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    **options: Any,
) -> Export:
    """Write a trained adapter as ``lora`` or ``merged`` model, or a start as ``residual`` base.

    Args:
        run: folder of the adapter.
        to: lora, merged or residual.
        output_dir: new, empty, or this very export's.
        overwrite: replace what an earlier run left there.
        notify: told of (phase, steps or bytes done, in all).
        **options: of `prepare_export`.

    Returns:
        the folder, its manifest, what it cost, and the errors per module.

    Raises:
        PktError: and its subclasses.

    """
    task = prepare_export(run, to, **options)
    return execute_export(task, Path(output_dir), overwrite=overwrite, notify=notify)


def _inputs(run: Path, to: str, extracted: Path | None) -> tuple[Adapter, Adapter | None]:
    """The adapter and the start that its base had subtracted."""
    from pkt.adapter import read_adapter

    adapter = read_adapter(run)
    method = (adapter.manifest or {}).get("method")
    if to == "residual":
        if method != "seeking":
            raise IncompatibleError(
                f"--run {run}: expected a start of pkt extract, found "
                + (f"a result of '{method}'" if method else "an adapter without pkt_manifest.json"),
                "--to residual takes the start itself, before any training",
            )
        if extracted:
            raise UsageError("--extracted: not with --to residual", "--run is the extraction")
        return adapter, None
    if method == "seeking":
        raise IncompatibleError(
            f"--run {run}: a start of pkt extract, not a trained adapter: added to the student it "
            "breaks it",
            "train from it first (pkt train --init), or take --to residual",
        )
    if extracted is None:
        if to == "lora" and adapter.base_model and _is_residual_base(Path(adapter.base_model)):
            raise UsageError(
                f"--run {run}: it was trained on a residual base, {adapter.base_model}",
                "add --extracted with the folder that pkt extract wrote",
            )
        return adapter, None
    if method is not None:
        raise IncompatibleError(
            f"--run {run}: a result of '{method}', which belongs to the untouched student already",
            "leave out --extracted",
        )
    start = read_adapter(extracted)
    if (start.manifest or {}).get("method") != "seeking":
        raise IncompatibleError(f"--extracted {extracted}: expected a folder of pkt extract")
    return adapter, start


def _is_residual_base(base: Path) -> bool:
    try:
        found = json.loads((base.parent / "pkt_manifest.json").read_text(encoding="utf-8"))
        return bool(base.name == "base" and found["to"] == "residual")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _student(
    given: str | None, adapter: Adapter, aliases: Mapping[str, str] | None
) -> tuple[Model, str]:
    """The student, and the name that an exported adapter gives it."""
    table = load_aliases(None) if aliases is None else aliases
    name = given or adapter.base_model
    if not name:
        raise UsageError(
            f"{adapter.folder}: its adapter_config.json names no base model", "add --student"
        )
    try:
        model = open_model(name, table, "student")
    except UsageError as error:
        if given:
            raise
        raise UsageError(
            f"{adapter.folder} names its base: {error.message}", "--student says where it lies"
        ) from error
    return model, base_name(model)


def _require_same_student(option: str, adapter: Adapter, student: Model) -> None:
    if adapter.manifest is None:
        return
    found, expected = adapter.manifest.get("student"), student.hashes()
    if not isinstance(found, dict):
        raise IncompatibleError(
            f"{option} {adapter.folder}: its pkt_manifest.json names no student"
        )
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        raise IncompatibleError(
            f"{option} {adapter.folder}: an adapter of another student than {student.name}: "
            f"{', '.join(differing)} differ",
            "--student says where its own lies",
        )


__all__ = ["execute_export", "export", "finished_export", "prepare_export"]
