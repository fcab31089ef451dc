"""`pkt.train`: fine-tune a student from a start, and export the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.choices import base_name, budget, compute_dtype, require_choice
from pkt.api.device import check_device
from pkt.api.distilling import open_teacher, require_pair
from pkt.api.online import open_said, require_both_fit, require_online, said_online
from pkt.api.supervising import EPOCHS, MODULES, choose_objective, open_supervisor
from pkt.config import format_bytes, load_aliases
from pkt.errors import BudgetError, CheckpointError, IncompatibleError, UsageError
from pkt.models import Model, load_tokenizer, open_model
from pkt.records import SampleSet, Template, Tuning

if TYPE_CHECKING:
    from pkt.methods.tuning import Online, Task

Notify = Callable[[str, int, int, Mapping[str, float]], None]

CONTROLS = ("lora", "pissa", "gaussian")
SPARE = 0.05  # share of the training rows that a cut may leave without an answer


def prepare_training(
    student: str,
    data: str | Path,
    *,
    init: str = "lora",
    norms_from: str | Path | None = None,
    eval_data: str | Path | None = None,
    start: str = "residual",
    rank: int | None = None,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    layers: str | Sequence[int] | None = None,
    dropout: float = 0.05,
    template: Template = "auto",
    max_tokens: int = 2048,
    max_examples: int = 1000,
    dtype: str = "auto",
    distill: str | None = None,
    teacher_targets: str | Path | None = None,
    distill_weight: float = 1.0,
    online: bool = False,
    teacher: str | None = None,
    top_k: int | None = None,
    objective: str | None = None,
    output_loss: str | None = None,
    kl_weight: float | None = None,
    max_ram: str | None = None,
    processes: int = 1,
    supervised: Online | None = None,
    aliases: Mapping[str, str] | None = None,
    **schedule: Any,
) -> Task:
    """Open everything a training run needs; no weight is read but the start's.

    Args:
        student: folder, hub id or alias.
        data: JSONL file of training examples, in the formats of seeds.
        init: folder that `pkt extract` wrote, or ``lora``, ``pissa``, ``gaussian``.
        norms_from: folder of an extraction whose ‖B₀A₀‖_F pissa and gaussian take.
        eval_data: JSONL file of held-out examples.
        start: ``residual``, ``scaled:c`` or ``a-only``.
        rank: r; ``None``: the extraction's, or 16.
        targets: roles or module names that a control adapts; ``None`` for all.
        embeddings: whether a control adapts embedding and head too.
        layers: student layers that a control adapts, from 1: "2,5" or numbers; ``None`` for all.
        dropout: of the trained half's input.
        template: how prompt and answer become one text.
        max_tokens: longer examples are cut.
        max_examples: the first so many rows are used; 0: all.
        dtype: of the student's weights: auto, float32 or bfloat16.
        distill: ``topk-kl`` or ``kl``: learn from a teacher's logits instead of the labels.
        teacher_targets: folder of these logits, which `write_targets` wrote for this data; for
            ``objective``: with activations.
        distill_weight: of the divergence, at most 1; the rest is the labels' cross-entropy.
        online: with ``distill``, in place of ``teacher_targets``: ``teacher`` stays in memory while
            the student trains, for the same numbers; ``kl`` is then of the whole vocabulary.
        teacher: folder, hub id or alias, with ``online``.
        top_k: logits that ``topk-kl`` compares, with ``online``; ``None``: 64.
        objective: ``v1``, ``v2``, ``acl`` or ``hidden-mse``: learn from a teacher's activations
            (`pkt.training.alignment`). LoRA is then on the paired layers alone, by default on
            their up, down, v and o, for 5 epochs.
        output_loss: of v1 (by default ``cosine``) and hidden-mse (``ce``): cosine, ce or kl.
        kl_weight: β, of the KL of v2 and of ``output_loss="kl"``; ``None``: 1.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        processes: that train together.
        supervised: in place of ``teacher_targets``: a teacher in memory, of ``pkt.align``.
        aliases: table of aliases; ``None`` for the built-in one.
        **schedule: fields of `pkt.training.Schedule`.

    Raises:
        PktError: and its subclasses, for each input that cannot be used.

    """
    require_choice("template", template, Template)
    require_online(online, teacher, teacher_targets, distill, top_k, processes)
    choice = None
    if objective is not None:
        if distill is not None:
            raise UsageError("--objective: not beside --distill", "take one of them")
        source = "memory" if supervised else teacher_targets
        choice = choose_objective(objective, output_loss, kl_weight, source)
        require_pair(None, None, distill_weight)
        require_paired(init, layers, embeddings)
        targets = targets or MODULES
        schedule = {"epochs": EPOCHS, **schedule}
    else:
        require_pair(distill, teacher_targets or (teacher if online else None), distill_weight)
        if output_loss is not None or kl_weight is not None:
            given = "--output-loss" if output_loss is not None else "--kl-weight"
            raise UsageError(f"{given}: not used without --objective")
    if schedule.get("eval_steps") and not eval_data:
        raise UsageError("--eval-steps: nothing is held out", "add --eval-data FILE.jsonl")
    model = open_model(student, load_aliases(None) if aliases is None else aliases, "student")
    from pkt.adapter import product_norm  # torch is loaded from here on
    from pkt.methods.tuning import Config, Task
    from pkt.methods.tuning.starts import Form
    from pkt.training import Schedule, require_stages, steps_in_all

    form = _form(start, Form)
    found: Any = None
    norms: dict[str, float] | None = None
    origin: dict[str, Any] = {}
    if init in CONTROLS:
        if init == "lora" and (start != "residual" or norms_from):
            raise UsageError("--init lora: begins at zero: it takes no --start and no --norms-from")
        if norms_from and form.name == "a-only":
            raise UsageError("--norms-from: a-only has norms of its own", "leave one of them out")
        if norms_from:
            scales, origin = _extraction(Path(norms_from), model, "--norms-from")
            norms = {name: product_norm(half) for name, half in scales.items()}
    else:
        refused = {
            "--targets": targets, "--embeddings": embeddings, "--layers": layers,
            "--norms-from": norms_from,
        }  # fmt: skip
        if odd := [name for name, value in refused.items() if value]:
            raise UsageError(
                f"{odd[0]}: the extraction says what is adapted",
                "leave it out, or take --init lora, pissa or gaussian",
            )
        found, origin = _extraction(Path(init), model, "--init")
        held = max(int(half.a.shape[0]) for half in found.values())
        rank = held if rank is None else rank
        if rank > held:
            raise UsageError(f"--rank {rank}: the extraction {init} has rank {held}")
    adapted = _layers(layers, model) if layers is not None else None
    tokenizer = load_tokenizer(model)
    options: dict[str, Any] = {"template": template, "max_tokens": max_tokens}
    read = _read(Path(data), model, tokenizer, limit=max_examples, **options)
    held_out = _read(Path(eval_data), model, tokenizer, **options) if eval_data else None
    computed = compute_dtype(model, dtype)
    _require_room(model, computed, budget(max_ram))
    timed = _schedule(Schedule, schedule)
    kept = {"template": read.template, "max_tokens": max_tokens, "max_examples": max_examples}
    taught: Any = None
    if choice and teacher_targets:
        taught = open_supervisor(Path(teacher_targets), choice, model, read, kept)
        adapted = taught.layers
        require_stages(
            taught.objective.stages, steps_in_all(len(read.samples), timed), processes
        )  # fmt: skip
    elif distill and teacher_targets:
        taught = open_teacher(Path(teacher_targets), distill, distill_weight, model, read, kept)
    elif distill and teacher:
        asked = {**kept, "dtype": dtype, "max_ram": max_ram, "aliases": aliases}
        said = open_said(teacher, student, data, distill, top_k, asked)
        assert said.samples.sha256 == read.sha256
        supervised = said_online(said, distill, distill_weight)
    origin_of = supervised.origin if supervised else taught.origin if taught else None
    config = Config(
        init=init if init in CONTROLS else "extracted", form=form, rank=rank or 16,
        targets=tuple(targets) if targets else None, embeddings=embeddings, layers=adapted,
        dropout=dropout, dtype=computed, distill=distill, distill_weight=distill_weight,
        alignment=choice.options() if choice else None, schedule=timed,
    )  # fmt: skip
    return Task(
        model, tokenizer, read, held_out, found, norms, origin, config, kept, base_name(model),
        processes, origin_of, taught.objective if taught else None, supervised,
        kernels=getattr(taught, "kernels", None),
    )  # fmt: skip


def read_held_out(
    task: Task, path: Path, *, template: Template = "auto", max_tokens: int = 2048
) -> SampleSet:
    """Samples of ``path`` as the student of ``task`` reads them, for measuring only."""
    return _read(path, task.student, task.tokenizer, template=template, max_tokens=max_tokens)


def execute_training(
    task: Task,
    folder: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    save_steps: int = 0,
    notify: Notify = lambda phase, done, total, metrics: None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuning:
    """Run what `prepare_training` made; a finished run with the same inputs is returned."""
    from pkt.methods import tuning
    from pkt.output import TUNED, finished

    place = pick_device(device)
    identity = {**task.identity(), "device": place}
    if not overwrite and (manifest := finished(folder, identity, TUNED)):
        record = json.loads((folder / "pkt_run.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return Tuning(folder, manifest, record, [json.loads(line) for line in lines])
    if task.online:
        require_both_fit(task.online.plan, place)
    return tuning.run(
        task, folder, device=place, overwrite=overwrite, save_steps=save_steps, notify=notify,
        stop=stop,
    )  # fmt: skip


def train(
    student: str,
    data: str | Path,
    output_dir: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    save_steps: int = 0,
    notify: Notify = lambda phase, done, total, metrics: None,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Tuning:
    """Fine-tune ``student`` on ``data`` from a start, and export the adapter to ``output_dir``.

    Args:
        student: folder, hub id or alias.
        data: JSONL file.
        output_dir: new, empty, or this very run's: the same call continues it.
        device: "auto" (CUDA where present), "cpu" or "cuda".
        overwrite: replace what an earlier run left there.
        save_steps: steps between checkpoints; 0: one about every five minutes.
        notify: told of (phase, steps done, steps in all, metrics).
        stop: asked after every step; if true, a checkpoint is kept and `KeyboardInterrupt` raised.
        **options: of `prepare_training`.

    Raises:
        PktError: and its subclasses.

    """
    return execute_training(
        prepare_training(student, data, **options), Path(output_dir), device=device,
        overwrite=overwrite, save_steps=save_steps, notify=notify, stop=stop,
    )  # fmt: skip


def pick_device(device: str) -> str:
    """``auto`` is CUDA where there is one; any other is checked."""
    if device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def require_paired(init: str, layers: Any, embeddings: bool) -> None:
    """Refuse options that would train more than the paired layers."""
    if init not in CONTROLS:
        raise UsageError(
            f"--init {init}: an extraction is of all layers, an objective trains the paired ones",
            "take --init lora, pissa or gaussian",
        )
    if layers is not None or embeddings:
        given = "--embeddings" if embeddings else "--layers"
        raise UsageError(f"{given}: an objective trains the layers that its targets pair")


def _layers(given: str | Sequence[int], student: Model) -> tuple[int, ...]:
    """Student layers from 1, ascending, each once."""
    parts = given.split(",") if isinstance(given, str) else [str(layer) for layer in given]
    found = set()
    for part in parts:
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UsageError(
                f"--layers {given}: expected layers counted from 1, found {part.strip()!r}",
                "for example --layers 2,5",
            )
        layer = int(part)
        if not 1 <= layer <= student.layers:
            raise UsageError(f"--layers {layer}: expected 1 to {student.layers} of {student.name}")
        found.add(layer)
    return tuple(sorted(found))


def _form(start: str, form: Any) -> Any:
    name, _, scale = start.partition(":")
    if name == "scaled" and scale:
        try:
            value = float(scale)
        except ValueError:
            value = 0.0
        if 0 < value < float("inf"):
            return form("scaled", value)
    elif name in ("residual", "a-only") and not scale:
        return form(name)
    raise UsageError(f"--start {start}: expected residual, a-only or scaled:c with c > 0")


def _schedule(kind: Any, given: Mapping[str, Any]) -> Any:
    schedule = kind(**given)
    positive = ("lr", "lr_ratio", "epochs", "batch_size", "micro_batch", "max_grad_norm")
    for name in positive:
        if not getattr(schedule, name) > 0:
            option = name.replace("_", "-")
            raise UsageError(f"--{option}: expected more than 0, found {getattr(schedule, name)}")
    if not 0 <= schedule.warmup < 1:
        raise UsageError(f"--warmup: expected a share from 0 to 1, found {schedule.warmup}")
    return schedule


def _extraction(folder: Path, student: Model, option: str) -> tuple[Any, dict[str, Any]]:
    """The factors of an extraction for this student, and their hash."""
    from pkt.adapter import read_factors

    path = folder / "pkt_manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        method, hashes = manifest["method"], dict(manifest["student"])
    except (FileNotFoundError, NotADirectoryError) as error:
        known = f"lora, pissa, gaussian or {'a' if option == '--init' else 'the'} folder"
        raise UsageError(
            f"{option} {folder}: expected {known} that pkt extract wrote, found no {path.name}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__} {error}") from error
    if method != "seeking":
        raise IncompatibleError(
            f"{option} {folder}: expected a start of pkt extract, found a result of '{method}'"
        )
    if (found := hashes) != (expected := student.hashes()):
        differing = ", ".join(k for k in expected if found.get(k) != expected[k])
        raise IncompatibleError(
            f"{option} {folder}: it was extracted for another student than {student.name}: "
            f"{differing} differ",
            "extract again with this --student",
        )
    factors = read_factors(folder)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return factors, {"select": manifest["options"]["select"], "adapter_sha256": digest}


def _read(path: Path, model: Model, tokenizer: Any, *, limit: int = 0, **options: Any) -> SampleSet:
    from pkt.samples import read_samples

    return read_samples(
        path, tokenizer, limit=limit, positions=model.positions,
        vocabulary=model.embedding.shape[0], spare=SPARE, **options,
    )  # fmt: skip


def _require_room(student: Model, dtype: str, allowed: tuple[int, str]) -> None:
    elements = sum(p.elements for layer in student.checkpoint.layers for p in layer.values())
    elements += sum(p.elements for p in student.checkpoint.outer.values())
    held = elements * (4 if dtype == "F32" else 2)
    if held > allowed[0]:
        raise BudgetError(
            f"{student.folder}: its weights alone hold {format_bytes(held)} while it trains; "
            f"{allowed[1]} allows {format_bytes(allowed[0])}",
            "train on a larger host" + (", or with --dtype bfloat16" if dtype == "F32" else ""),
        )


__all__ = ["execute_training", "pick_device", "prepare_training", "require_paired", "train"]
