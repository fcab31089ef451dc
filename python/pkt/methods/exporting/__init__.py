"""What was trained, in the form that others take: a LoRA, a whole model, or a residual base.

With Δ = BA − B₀A₀ of arXiv 2310.11451, section 3.2, where (B₀, A₀) is the start:

========  ===================================================  ==========================
form      what is written                                      for
========  ===================================================  ==========================
lora      [B | −B₀], [A ; A₀] on the untouched student          PEFT, vLLM
merged    round(W + Δ), a complete model                        everything else
residual  W − B₀A₀, and (B₀, A₀) as a LoRA on it                training with other tools
========  ===================================================  ==========================
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pkt.adapter import (
    check_adapter,
    recompress,
    write_factors,
)
from pkt.checkpoint import FLOAT_DTYPES, open_checkpoint
from pkt.config import format_bytes
from pkt.errors import BudgetError, OutputError
from pkt.host import Costs, PeakMeter, describe
from pkt.merging import (
    Change,
    Layout,
    compare_model,
    copy_rest,
    index_of,
    lay_out,
    new_config,
    rest_of,
    write_model,
)
from pkt.methods.exporting.card import card, serving_note
from pkt.methods.exporting.check import Check, compare_factors, compare_logits, fits
from pkt.methods.exporting.modules import Architecture, open_architecture
from pkt.methods.exporting.stored import require_own_base
from pkt.methods.exporting.task import Form, Task
from pkt.output import MANIFEST, as_json, publish, run_folder
from pkt.records import Export
from pkt.workplace import free_bytes

__all__ = ["Architecture", "Form", "Task", "open_architecture", "run", "serving_note"]

Notify = Callable[[str, int, int], None]


def run(
    task: Task,
    folder: Path,
    *,
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Export:
    """Write what ``task`` asks for into ``folder``, and load it back; a failure leaves nothing.

    Args:
        task: opened inputs and options.
        folder: OUT.
        overwrite: replace what an earlier run of pkt left there.
        notify: told of (phase, steps or bytes done, in all).

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    costs, peak = Costs(), PeakMeter()
    layout = _layout(task, folder) if task.to != "lora" else None
    require_own_base(task)
    with peak.running(), run_folder(folder, task.identity(), overwrite) as work:
        staged = work / "result"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            if layout is None:
                found = _lora(task, staged, costs, notify)
            elif task.to == "merged":
                found = _model(task, layout, staged, costs, notify)
            else:
                found = _residual(task, layout, staged, folder, costs, notify)
        except BaseException as error:
            shutil.rmtree(staged, ignore_errors=True)
            (work / "run.json").unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{folder}: the disk is full; what was written is removed again",
                    "make room, then run the same command again",
                ) from error
            raise
        lost = max(found["errors"].values(), default=None)
        extracted = str(task.adapter.folder)
        texts = {"README.md": card({**task.identity(), **found}, task.base_model, extracted, lost)}
        names = sorted({*(path.name for path in staged.iterdir()), *texts})
        manifest = {**task.identity(), **found, "files": names}
        record = _run_record(staged, costs, peak)
        texts |= {"pkt_run.json": as_json(record), MANIFEST: as_json(manifest)}
        publish(folder, staged, texts)
    return Export(folder, manifest, record)


def _lora(task: Task, staged: Path, costs: Costs, notify: Notify) -> dict[str, Any]:
    """Both halves side by side, recompressed if asked to."""
    factors, errors = task.changes(), {}
    squares = [0.0, 0.0]
    with costs.phase("factors"):
        for done, (name, half) in enumerate(factors.items()):
            if task.rank is not None:
                made = recompress(half, task.rank)
                factors[name], errors[name] = made.factors, made.relative
                squares = [squares[0] + made.error**2, squares[1] + made.norm**2]
                notify("recompress", done + 1, len(factors))
    rank = write_factors(staged, factors, task.architecture.modules, task.base_model)
    with costs.phase("check"):
        check_adapter(staged, task.student.folder)
        exact = not any(errors.values())
        in_memory = fits(task)
        notify("check logits" if in_memory else "check factors", 1, 1)
        compare = compare_logits if in_memory else compare_factors
        check = compare(task, staged, exact)
    whole = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return _found(rank, "F32", errors, check, whole_error=whole)


def _model(
    task: Task, layout: Layout, staged: Path, costs: Costs, notify: Notify
) -> dict[str, Any]:
    """The student with Δ in its weights."""
    errors = _write_base(task, layout, staged, costs, notify)
    dtypes = {output.dtype for shard in layout.shards.values() for output in shard}
    exact = dtypes & FLOAT_DTYPES <= {"F32", "F64"}
    checks = []
    with costs.phase("check"):
        if not (exact and fits(task)):
            checks.append(_compare_files(task, layout, staged, notify))
        if fits(task):
            notify("check logits", 1, 1)
            checks.append(compare_logits(task, staged, exact))
    dtype = task.dtype or task.student.checkpoint.dtypes()[0]
    return _found(task.adapter.rank, dtype, errors, checks[-1], parted=_parted(task))


def _residual(
    task: Task, layout: Layout, staged: Path, folder: Path, costs: Costs, notify: Notify
) -> dict[str, Any]:
    """W − B₀A₀, and the start as an adapter on it."""
    base, adapter = staged / "base", staged / "adapter"
    base.mkdir()
    adapter.mkdir()
    errors = _write_base(task, layout, base, costs, notify)
    final = str((folder / "base").resolve())
    rank = write_factors(adapter, task.adapter.factors, task.architecture.modules, final)
    with costs.phase("check"):
        check_adapter(adapter, base)
        if fits(task):
            notify("check logits", 1, 1)
            check = compare_logits(task, staged, task.dtype == "F32")
        else:
            check = _compare_files(task, layout, base, notify)
    dtype = task.dtype or task.student.checkpoint.dtypes()[0]
    return _found(rank, dtype, errors, check, parted=_parted(task))


def _found(
    rank: int, dtype: str, errors: Mapping[str, float], check: Check, **more: Any
) -> dict[str, Any]:
    """The manifest's part that was found."""
    return {
        "rank": rank,
        "dtype": dtype,
        "parted": False,
        "errors": dict(errors),
        "check": asdict(check),
        **more,
    }


def _layout(task: Task, folder: Path) -> Layout:
    """The tensors to write; refused where the student or the disk does not allow it."""
    changes = {}
    for name, half in task.changes().items():
        place = task.places[name]
        b, a = (half.a.T, half.b.T) if place.transposed else (half.b, half.a)
        changes[place.tensor] = Change(b.contiguous(), a.contiguous())
    added = task.architecture.parted(task.places)
    unread = task.architecture.unread()
    layout = lay_out(task.student.checkpoint, changes, task.dtype, added, unread)
    index_of(task.student.checkpoint, layout)
    rest_of(task.student.folder)
    if layout.bytes > (free := free_bytes(folder)):
        raise BudgetError(
            f"{folder}: the model takes {format_bytes(layout.bytes)}; its disk has "
            f"{format_bytes(free)} free",
            "make room, or choose another -o",
        )
    return layout


def _parted(task: Task) -> bool:
    return task.architecture.parts(task.places)


def _write_base(
    task: Task, layout: Layout, folder: Path, costs: Costs, notify: Notify
) -> dict[str, float]:
    """Write the model of ``layout``; what rounding took of each module's change."""
    student = task.student
    with costs.phase("write"):
        copy_rest(
            student.folder, folder, new_config(student.config, task.dtype, untied=_parted(task))
        )
        lost = write_model(
            student.checkpoint, layout, folder, lambda *step: notify(f"write {step[0]}", *step[1:])
        )
    modules = {place.tensor: name for name, place in task.places.items()}
    return {modules[tensor]: error for tensor, error in lost.items()}


def _compare_files(task: Task, layout: Layout, folder: Path, notify: Notify) -> Check:
    written = open_checkpoint(folder, task.student.layers)
    compare_model(
        task.student.checkpoint, layout, written, lambda *step: notify("check files", *step[1:])
    )
    return Check("files", 0.0, 0.0)


def _run_record(staged: Path, costs: Costs, peak: PeakMeter) -> dict[str, Any]:
    """`pkt_run.json`: what this process did and what it cost."""
    written = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    return {
        "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
        "bytes_written": written,
        "peak_anonymous_bytes": peak.peak_bytes,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "host": describe(),
    }
