"""`pkt.extract`: what the command of this name does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.choices import (
    base_name,
    budget,
    checked_every,
    compute_dtype,
    optional_path,
    require_choice,
)
from pkt.api.device import check_device, free_device_bytes, require_device_fit
from pkt.api.fitting import kept_records, reading, require_fit
from pkt.api.vocabulary import vocabulary_problems
from pkt.batches import most_rows, shapes
from pkt.config import load_aliases
from pkt.errors import IncompatibleError, UsageError
from pkt.models import load_tokenizer, open_model
from pkt.plan import make_plan
from pkt.projections import match
from pkt.records import (
    Extraction,
    IoMode,
    LayerRule,
    Reading,
    SampleSet,
    Select,
    Split,
    Template,
)
from pkt.workplace import room

if TYPE_CHECKING:
    from pkt.methods.seeking import Task

Notify = Callable[[str, int, int], None]


def prepare(
    teacher: str,
    student: str,
    seeds: str | Path | SampleSet,
    *,
    rank: int = 16,
    layers: LayerRule = "sensitivity",
    select: Select = "window",
    split: Split = "paper",
    targets: Sequence[str] | None = None,
    template: Template = "auto",
    embeddings: bool = False,
    max_tokens: int = 2048,
    limit: int = 32,
    max_ram: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    spool_dir: str | Path | None = None,
    spool_every: int | None = None,
    output_dir: str | Path = "OUT",
    processes: int = 1,
    processes_here: int = 1,
    aliases: Mapping[str, str] | None = None,
) -> Task:
    """Open everything an extraction needs and plan it; no weight is read.

    ``seeds`` is a JSONL file, or samples that are tokens already. ``output_dir`` is that of
    `execute`: the plan asks its disk for room. torchrun has started the ``processes`` that share
    the seeds, ``processes_here`` of them on this host, whose memory and disk they share.

    Raises:
        IncompatibleError: teacher and student do not fit (every reason, a line each).
        PktError: and its subclasses, for each input that cannot be used.

    """
    if rank < 1:
        raise UsageError(f"--rank: expected 1 or more, found {rank}")
    for option, value, kind in (
        ("layers", layers, LayerRule),
        ("select", select, Select),
        ("split", split, Split),
        ("template", template, Template),
    ):
        require_choice(option, value, kind)
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student")
    whole = select == "consistent"
    pairs, _, problems = match(big, small, targets, embeddings, whole_heads=whole)
    if embeddings:
        problems += vocabulary_problems(big, small)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompatibleError(
            f"{teacher} → {student}: {problems[0]}{more}",
            f"pkt inspect --teacher {teacher} --student {student}"
            + (" --select consistent" if whole else "")
            + " shows every module",
        )
    from pkt.methods.seeking import Config, Task  # torch is loaded from here on
    from pkt.samples import read_samples

    if isinstance(seeds, SampleSet):
        read = seeds
    else:
        read = read_samples(
            Path(seeds), load_tokenizer(big), template=template, limit=limit,
            max_tokens=max_tokens, positions=big.positions, vocabulary=big.embedding.shape[0],
        )  # fmt: skip
    if len(read.samples) < processes:
        raise UsageError(
            f"{len(read.samples)} seeds for {processes} processes: expected a seed for each",
            "start fewer processes, or give more seeds",
        )
    computed = compute_dtype(big, dtype)
    lengths = [len(sample.tokens) for sample in read.samples]
    plan = make_plan(
        big, small, pairs, dtype=computed, rank=rank, longest=read.longest,
        rows=most_rows(lengths), shapes=shapes(lengths),
        tokens=_tokens_here(read, processes, processes_here), seeds=read.tokens,
        budget=budget(max_ram, processes_here), embeddings=embeddings,
        every=checked_every(spool_every),
        room=room(Path(output_dir), optional_path(spool_dir), processes_here),
        **kept_records(select),
    )  # fmt: skip
    config = Config(
        rank=rank, layers=layers, select=select, split=split,
        targets=tuple(targets) if targets else None, embeddings=embeddings, dtype=computed,
        seed=seed,
    )  # fmt: skip
    options = {"template": read.template, "max_tokens": max_tokens, "limit": limit}
    base = base_name(small)
    return Task(big, small, read, pairs, plan, config, options, base, processes)


def extract(
    teacher: str,
    student: str,
    seeds: str | Path,
    output_dir: str | Path,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    **options: Any,
) -> Extraction:
    """Extract a LoRA start for ``student`` from ``teacher`` into ``output_dir``.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        seeds: JSONL file.
        output_dir: new, empty, or this very run's: the same call continues it.
        io: how files are read; "auto" measures, where the page cache cannot hold them.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run left there.
        notify: told of (phase, steps done, steps in all).
        **options: of `prepare`.

    Returns:
        the folder, its manifest, and what the run cost.

    Raises:
        PktError: and its subclasses; `BudgetError` before anything is read.

    """
    return execute(
        prepare(teacher, student, seeds, output_dir=output_dir, **options), Path(output_dir),
        io=io, device=device, overwrite=overwrite, notify=notify,
    )  # fmt: skip


def execute(
    task: Task,
    folder: Path,
    *,
    io: IoMode | Reading = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Extraction:
    """Run what `prepare` made; a finished run with the same inputs is returned as it is.

    Of several processes all but the first return no more than the run's identity.
    """
    import json

    from pkt.methods import seeking
    from pkt.output import finished
    from pkt.processes import from_first, joined

    if task.processes > 1:
        check_device(device)
    with joined(task.processes, device):
        manifest = None if overwrite else finished(folder, task.identity())
        if from_first("finished" if manifest else "to do") == "finished":
            if manifest is None:  # another host's OUT holds it
                return Extraction(folder, task.identity(), {})
            record = json.loads((folder / "pkt_run.json").read_text(encoding="utf-8"))
            return Extraction(folder, manifest, record)
        require_fit(task.plan)
        check_device(device)
        require_device_fit(task.plan, free_device_bytes(device))
        chosen = io if isinstance(io, Reading) else reading(task, io)
        return seeking.run(
            task, folder, io=chosen, device=device, overwrite=overwrite, notify=notify
        )


def _tokens_here(seeds: SampleSet, processes: int, here: int) -> int:
    """The most tokens that ``here`` of the processes have together."""
    from pkt.processes import balanced

    lengths = [len(sample.tokens) for sample in seeds.samples]
    shares = (sum(lengths[item] for item in part) for part in balanced(lengths, processes))
    return sum(sorted(shares)[-here:])
