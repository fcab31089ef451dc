"""`pkt.evaluate`: what `pkt eval` does, as a function: models beside each other on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pkt.api.choices import budget, compute_dtype
from pkt.api.device import check_device
from pkt.api.extracting import Notify
from pkt.api.vocabulary import shared_rows
from pkt.config import MIB, format_bytes, load_aliases
from pkt.errors import BudgetError, IncompatibleError, PktError, UsageError
from pkt.models import Model, load_tokenizer, open_model
from pkt.records import Evaluation, Template

if TYPE_CHECKING:
    from pkt.evaluation.columns import Adapter
    from pkt.evaluation.tasks import Asked
    from pkt.methods.evaluating import Request

_BASE_BYTES = 576 * MIB  # torch, transformers and peft, before a model


def prepare_evaluation(
    model: str,
    *,
    tasks: Sequence[str],
    data: str | Path | Mapping[str, str | Path] | None = None,
    adapters: Sequence[str | Path] = (),
    teacher: str | None = None,
    limit: int = 0,
    template: Template = "auto",
    max_tokens: int = 2048,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    allow_code_exec: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1234,
    max_ram: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Request:
    """Open models, adapters and data, and check all that can be checked; no weight is read.

    Args:
        model: the student: folder, hub id or alias.
        tasks: ``loss``, benchmarks, or names of lm-eval; ``@N`` sets the few-shot examples.
        data: a folder or file for every task, or a mapping of task name (``""``: all others) to
            one. Without it a benchmark is lm-eval's own, from the hub or its cache.
        adapters: PEFT folders for the student.
        teacher: what the student is to come near; same vocabulary where ``loss`` is asked.
        limit: first so many rows of each task, of each subject or task file of MMLU and
            Super-NaturalInstructions; 0 for all.
        template: of ``loss`` and AlpacaFarm.
        max_tokens: longer ``loss`` texts are cut.
        max_new_tokens: longest generation; by default each task's own.
        batch_size: prompts in a batch of a benchmark.
        allow_code_exec: run generated programs in `pkt.sandbox`; else they are only written.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (the checkpoint's own, float32 for float16), "float32" or "bfloat16".
        seed: of few-shot draws; 1234 is lm-eval's.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        PktError: and its subclasses, for each input that cannot be used.

    """
    from pkt.evaluation.columns import open_adapters
    from pkt.evaluation.tasks import default_shots, parse_tasks, require_lm_eval
    from pkt.methods.evaluating import Request

    if limit < 0 or batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise UsageError("--limit must be 0 or more, --batch-size and --max-new-tokens 1 or more")
    if template not in get_args(Template):
        raise UsageError(f"--template {template}: expected {', '.join(get_args(Template))}")
    asked = parse_tasks(tasks)
    table = load_aliases(None) if aliases is None else aliases
    small = open_model(model, table, "student")
    big = open_model(teacher, table, "teacher") if teacher else None
    found = open_adapters([Path(folder) for folder in adapters], small)
    for adapter in found:
        _require_keys(adapter, small)
    if device == "auto":
        device = _best_device()
    check_device(device)
    dtypes = {"student": compute_dtype(small, dtype)}
    if big:
        dtypes["teacher"] = compute_dtype(big, dtype)
    wants_loss = any(each.name == "loss" for each in asked)
    if any(each.name != "loss" for each in asked):
        require_lm_eval()
    shared = None
    if big and wants_loss:
        shared = shared_rows(
            big, small, "losses a token compare within one vocabulary only",
            "leave out the task 'loss', or --teacher",
        )  # fmt: skip
    _require_room(small, big, dtypes, wants_loss, max_ram)
    if allow_code_exec and any(each.name in ("humaneval", "mbpp") for each in asked):
        from pkt.sandbox import isolation

        isolation()
    options = {
        "limit": limit, "template": template, "max_tokens": max_tokens, "seed": seed,
        "max_new_tokens": max_new_tokens, "allow_code_exec": allow_code_exec,
    }  # fmt: skip
    tokenizers = {"student": load_tokenizer(small)}
    if big:
        tokenizers["teacher"] = load_tokenizer(big)
    request = Request(
        small, big, found, asked, None, {}, tokenizers, shared, {}, dtypes, options, batch_size,
        device,
    )  # fmt: skip
    for each in asked:
        place = _place(each.name, data)
        if each.name == "loss":
            _read_loss(request, place)
        else:
            _read_task(request, each, place)
            if place is not None:
                request.data[each.label]["shots"] = default_shots(each)
    return request


def evaluate(
    model: str,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    quiet: bool = True,
    notify: Notify = lambda phase, done, total: None,
    **options: Any,
) -> Evaluation:
    """Evaluate ``model``, adapters on it and a teacher on tasks, into ``output_dir``.

    Args:
        model: the student: folder, hub id or alias.
        output_dir: new, empty, or this very run's: the same call continues it.
        overwrite: replace what an earlier run left there.
        quiet: keep lm-eval's bars and log lines from the terminal.
        notify: told of ("column: task", steps done, steps in all).
        **options: of `prepare_evaluation`.

    Raises:
        PktError: and its subclasses; `BudgetError` before a weight is read.

    """
    return execute_evaluation(
        prepare_evaluation(model, **options), Path(output_dir),
        overwrite=overwrite, quiet=quiet, notify=notify,
    )  # fmt: skip


def execute_evaluation(request: Request, folder: Path, **options: Any) -> Evaluation:
    """Run what `prepare_evaluation` made: `pkt.methods.evaluating.run`."""
    from pkt.methods import evaluating

    return evaluating.run(request, folder, **options)


def data_formats() -> str:
    """What the files of each task look like, and under which names they are found."""
    return resources.files("pkt").joinpath("data/tasks/README.md").read_text(encoding="utf-8")


def _read_loss(request: Request, place: Path | None) -> None:
    from pkt.evaluation.formats import find
    from pkt.samples import read_samples

    if place is None:
        raise UsageError("task 'loss' needs --data", "a JSONL file, or a folder with loss.jsonl")
    options, models = request.options, (request.student, request.teacher)
    positions = [model.positions for model in models if model and model.positions]
    (path,) = find("loss", place)[:1]
    read = read_samples(
        path, request.tokenizers["student"], template=options["template"],
        limit=options["limit"], max_tokens=options["max_tokens"],
        positions=min(positions, default=None), spare=1.0,
        vocabulary=min(model.embedding.shape[0] for model in models if model),
    )  # fmt: skip
    if not read.samples:
        raise UsageError(
            f"{path}: every text is cut before its answer begins", "raise --max-tokens"
        )
    if read.masked:
        request.notes.append(
            f"loss: {len(read.masked)} texts are cut before their answer begins and left out"
        )
    request.samples = read
    request.data["loss"] = {
        "sha256": read.sha256, "template": read.template, "count": len(read.samples),
        "tokens": read.loss_tokens,
    }  # fmt: skip


def _read_task(request: Request, asked: Asked, place: Path | None) -> None:
    from pkt.evaluation.formats import LAYOUTS, digest, read_benchmark
    from pkt.evaluation.quiet import silence

    if asked.name in LAYOUTS and place is not None:
        parts = read_benchmark(asked.name, place)
        request.parts[asked.label] = parts
        request.data[asked.label] = {"sha256": digest(parts)}
    elif asked.name in ("superni", "alpacafarm"):
        raise UsageError(f"task '{asked.name}' needs --data", "lm-eval has no task of this name")
    else:
        from importlib.metadata import version

        request.data[asked.label] = {"lm_eval": version("lm_eval")}
    with silence():
        request.lm_tasks(asked, "student")


def _place(name: str, data: str | Path | Mapping[str, str | Path] | None) -> Path | None:
    if data is None or isinstance(data, (str, Path)):
        return Path(data) if data is not None else None
    found = data.get(name, data.get(""))
    return Path(found) if found is not None else None


def _require_keys(adapter: Adapter, student: Model) -> None:
    """A LoRA must load on the student's skeleton with no missing and no unexpected key."""
    from pkt.adapter import check_adapter
    from pkt.evaluation.quiet import silence

    if adapter.changes_base:
        return
    try:
        with silence():
            check_adapter(adapter.folder, student.folder)
    except (PktError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200].removeprefix(f"{adapter.folder}: ")
        raise IncompatibleError(
            f"{adapter.folder}: adapter of another student: {reason}",
            "give the student it was trained on as --model",
        ) from error


def _require_room(
    student: Model, teacher: Model | None, dtypes: Mapping[str, str], together: bool,
    max_ram: str | None,
) -> None:  # fmt: skip
    """Student and teacher lie in memory side by side, whole."""
    allowed, source = budget(max_ram)
    held = {"student": _bytes(student, dtypes["student"])}
    if teacher:
        held["teacher"] = _bytes(teacher, dtypes["teacher"])
    needed = sum(held.values()) + _BASE_BYTES
    if needed > allowed:
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items())
        raise BudgetError(
            f"this evaluation holds {format_bytes(needed)} ({listed}); {source} allows "
            f"{format_bytes(allowed)}",
            f"the smallest setting that fits is --max-ram {-(-needed // MIB)}MiB"
            + ("; or leave out --teacher" if teacher else ""),
        )


def _bytes(model: Model, dtype: str) -> int:
    layers = model.checkpoint.layers
    pieces = [p for layer in layers for p in layer.values()] + list(model.checkpoint.outer.values())
    return sum(p.elements for p in pieces) * (4 if dtype == "F32" else 2)


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
