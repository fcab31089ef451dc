"""`pkt.write_targets`: what a teacher says of the training data, for a student to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.extracting import (
    budget,
    check_device,
    compute_dtype,
    reading,
    require_choice,
    require_fit,
    shared_rows,
)
from pkt.api.training import SPARE
from pkt.batches import most_rows, shapes
from pkt.config import load_aliases
from pkt.errors import IncompatibleError, UsageError
from pkt.models import Model, load_tokenizer, open_model, vocabulary_sha256
from pkt.plan import make_forward_plan
from pkt.records import IoMode, Reading, Recording, SampleSet, Template
from pkt.workplace import room

if TYPE_CHECKING:
    from pkt.methods.targeting import Task

Notify = Callable[[str, int, int], None]

TOP_K = 64


def prepare_targets(
    teacher: str,
    student: str,
    data: str | Path,
    *,
    top_k: int = TOP_K,
    template: Template = "auto",
    max_tokens: int = 2048,
    max_examples: int = 1000,
    dtype: str = "auto",
    max_ram: str | None = None,
    spool_dir: str | Path | None = None,
    output_dir: str | Path = "OUT",
    aliases: Mapping[str, str] | None = None,
) -> Task:
    """Open everything that a pass over the training data needs, and plan it; no weight is read.

    Args:
        teacher: folder, hub id or alias.
        student: the same; of the teacher's tokenizer, which reads the data as in training.
        data: JSONL file of training examples.
        top_k: logits kept of each answer token; 0: those of the whole vocabulary.
        template: how prompt and answer become one text.
        max_tokens: longer examples are cut.
        max_examples: the first so many rows are used; 0: all.
        dtype: computed in: auto, float32 or bfloat16.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        spool_dir: where hidden states lie meanwhile; ``None``: in the output folder.
        output_dir: of `execute_targets`: the plan asks its disk for room.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        IncompatibleError: the tokenizers differ, or the teacher takes fewer tokens than an example
            has.
        PktError: and its subclasses, for each input that cannot be used.

    """
    require_choice("template", template, Template)
    if top_k < 0:
        raise UsageError(f"--top-k {top_k}: expected 0 (the whole vocabulary) or more")
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student")
    rows = shared_rows(
        big, small, "a teacher's logits are targets within one vocabulary only",
        "take a teacher of the student's tokenizer",
    )  # fmt: skip
    digest = vocabulary_sha256(small)
    assert digest is not None  # shared_rows has looked
    from pkt.methods.targeting import Config, Task  # torch is loaded from here on
    from pkt.samples import read_samples

    samples = read_samples(
        Path(data), load_tokenizer(small), template=template, limit=max_examples,
        max_tokens=max_tokens, positions=small.positions, spare=SPARE,
    )  # fmt: skip
    _require_readable(samples, big, rows)
    config = Config(min(top_k or rows, rows), rows, compute_dtype(big, dtype))
    options = {
        "template": samples.template, "max_tokens": max_tokens, "max_examples": max_examples,
    }  # fmt: skip
    results, held = _sizes(samples, config.top_k)
    lengths = [len(sample.tokens) for sample in samples.samples]
    plan = make_forward_plan(
        big, dtype=config.dtype, tokens=samples.tokens,
        rows=most_rows(lengths), shapes=shapes(lengths),
        answers=samples.loss_tokens, results=results, held=held, budget=budget(max_ram),
        room=room(Path(output_dir), Path(spool_dir) if spool_dir else None),
    )  # fmt: skip
    return Task(big, samples, digest, plan, config, options)


def execute_targets(
    task: Task,
    folder: Path,
    *,
    io: IoMode | Reading = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Recording:
    """Run what `prepare_targets` made; a finished run with the same inputs is returned."""
    from pkt.methods import targeting

    if not overwrite and (held := finished_targets(task, folder)):
        return held
    require_fit(task.plan)
    check_device(device)
    chosen = io if isinstance(io, Reading) else reading(task, io)
    return targeting.run(task, folder, io=chosen, device=device, overwrite=overwrite, notify=notify)


def finished_targets(task: Task, folder: Path) -> Recording | None:
    """What an earlier run with the inputs of ``task`` left in ``folder``, if it is whole."""
    from pkt.output import finished
    from pkt.targets import FOLDER, INDEX

    names = (*(f"{FOLDER}/{shard.file}" for shard in task.shards), f"{FOLDER}/{INDEX}")
    manifest = finished(folder, task.identity(), names)
    if manifest is None:
        return None
    record = json.loads((folder / "pkt_run.json").read_text(encoding="utf-8"))
    return Recording(folder, manifest, record)


def write_targets(
    teacher: str,
    student: str,
    data: str | Path,
    output_dir: str | Path,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    **options: Any,
) -> Recording:
    """Write the ``teacher``'s top logits at every answer token of ``data`` to ``output_dir``.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        data: JSONL file.
        output_dir: new, empty, or this very run's: the same call continues it.
        io: how files are read; "auto" measures, where the page cache cannot hold them.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run left there.
        notify: told of (phase, steps done, steps in all).
        **options: of `prepare_targets`.

    Raises:
        PktError: and its subclasses; `BudgetError` before anything is read.

    """
    task = prepare_targets(teacher, student, data, output_dir=output_dir, **options)
    return execute_targets(
        task, Path(output_dir), io=io, device=device, overwrite=overwrite, notify=notify
    )


def _require_readable(samples: SampleSet, teacher: Model, rows: int) -> None:
    """The teacher can be shown the examples as the student reads them."""
    for sample in samples.samples:
        if teacher.positions is not None and len(sample.tokens) > teacher.positions:
            raise IncompatibleError(
                f"{sample.name}: {len(sample.tokens)} tokens; the teacher {teacher.name} takes "
                f"{teacher.positions}",
                f"cut the examples with --max-tokens {teacher.positions}, in pkt train as well",
            )
        if max(sample.tokens) >= rows:
            raise IncompatibleError(
                f"{sample.name}: token {max(sample.tokens)} is not among the {rows} that teacher "
                "and student both have rows for"
            )


def _sizes(samples: SampleSet, top_k: int) -> tuple[int, int]:
    """Bytes of all targets, and of the largest file of them."""
    from pkt.targets import layout, row_bytes

    shards = layout([sample.loss_tokens for sample in samples.samples], top_k)
    each = row_bytes(top_k)
    return samples.loss_tokens * each, max(shard.rows for shard in shards) * each


__all__ = ["execute_targets", "finished_targets", "prepare_targets", "write_targets"]
