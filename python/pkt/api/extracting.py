"""`pkt.extract` and `pkt.inspect`: what the commands of these names do, as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from pkt.api.device import free_device_bytes, require_device_fit
from pkt.config import load_aliases, parse_bytes
from pkt.errors import BudgetError, IncompatibleError, UsageError
from pkt.host import memory_limit
from pkt.models import Model, load_tokenizer, open_model, vocabulary
from pkt.plan import make_plan
from pkt.projections import Pair, match, projections_of
from pkt.records import (
    Extraction,
    Inspection,
    IoMode,
    LayerRule,
    Plan,
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


class HasPlan(Protocol):
    """A prepared run that streams a teacher."""

    @property
    def teacher(self) -> Model:
        """The model that is read."""

    @property
    def plan(self) -> Plan:
        """What the run holds, reads and writes."""


def inspect(
    teacher: str,
    student: str | None = None,
    *,
    max_ram: str | None = None,
    rank: int = 16,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    dtype: str = "auto",
    seeds: int = 32,
    tokens: int = 2048,
    select: Select = "window",
    spool_dir: str | Path | None = None,
    spool_every: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Inspection:
    """Families, shapes, what fits what, and the plan of a run, from headers alone.

    No weight is read and torch is not loaded. What forbids the run is in ``problems``; only
    models that cannot be opened at all raise.

    Args:
        teacher: folder, hub id or alias.
        student: the same; ``None`` describes the teacher alone.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        rank: of the adapter.
        targets: roles or module names; ``None`` for all projections.
        embeddings: whether embedding and head are extracted too.
        dtype: auto, float32 or bfloat16.
        seeds: number of seeds assumed.
        tokens: length of a seed assumed.
        select: strategy; each has its own needs of disk, and ``consistent`` of shapes.
        spool_dir: where the spool would lie; ``None``: below an output folder on the disk of the
            current one.
        spool_every: every k-th layer's inputs are kept there; ``None``: the smallest k that fits.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        PktError: and its subclasses, when a model cannot be opened.

    """
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student") if student else None
    pairs: list[Pair] = []
    rows: list[Any] = []
    problems: list[str] = []
    if small:
        pairs, rows, problems = match(
            big, small, targets, embeddings, whole_heads=select == "consistent"
        )
        if embeddings:
            problems += _vocabulary_problems(big, small)
    else:
        projections_of(big)  # refuses layers that no student could be cut from
    tokens = min(tokens, big.positions or tokens)
    plan = make_plan(
        big, small, pairs, dtype=compute_dtype(big, dtype), rank=rank, tokens=seeds * tokens,
        longest=tokens, budget=budget(max_ram), embeddings=embeddings,
        every=checked_every(spool_every), room=room(Path("OUT"), _path(spool_dir)),
        **_records(select),
    )  # fmt: skip
    notes = [f"{seeds} seeds of {tokens} tokens assumed"]
    for model in (big, small):
        if model and model.checkpoint.unindexed:
            extra = model.checkpoint.unindexed
            count = f"{len(extra)} tensors are not in the index"
            notes.append(f"{model.folder}: {count}: {extra[0]}, …")
    return Inspection(
        teacher=description(big),
        student=description(small) if small else None,
        rows=tuple(rows),
        plan=plan,
        problems=tuple(problems),
        notes=tuple(notes),
    )


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
        problems += _vocabulary_problems(big, small)
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
            max_tokens=max_tokens, positions=big.positions,
        )  # fmt: skip
    if len(read.samples) < processes:
        raise UsageError(
            f"{len(read.samples)} seeds for {processes} processes: expected a seed for each",
            "start fewer processes, or give more seeds",
        )
    computed = compute_dtype(big, dtype)
    plan = make_plan(
        big, small, pairs, dtype=computed, rank=rank, longest=read.longest,
        tokens=_tokens_here(read, processes, processes_here),
        budget=budget(max_ram, processes_here), embeddings=embeddings,
        every=checked_every(spool_every), room=room(Path(output_dir), _path(spool_dir)),
        **_records(select),
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


def reading(task: HasPlan, io: IoMode = "auto", *, measured: bool = True) -> Reading:
    """The reading mode of a run: as asked, or chosen by a short measurement of the files.

    Without ``measured`` no file is read, and the mode stays "auto" where that would decide.
    """
    from pkt.disk import choose_io

    require_choice("io", io, IoMode)
    if io != "auto":
        return Reading(io, f"--io {io}")
    return choose_io(task.teacher.checkpoint, task.plan, memory_limit()[0], measured=measured)


def require_fit(plan: Plan) -> None:
    """Raise `BudgetError` with the smallest setting unless the plan fits memory and disks."""
    from pkt.config import MIB, format_bytes

    if not plan.fits:
        raise BudgetError(
            f"this run holds {format_bytes(plan.peak_bytes)} at its peak; {plan.budget_source} "
            f"allows {format_bytes(plan.budget_bytes)}",
            f"the smallest setting that fits is --max-ram {plan.smallest_bytes // MIB}MiB",
        )
    for disk in plan.disks:
        if disk.bytes > disk.free_bytes:
            raise BudgetError(
                f"{disk.folder}: this run writes {format_bytes(disk.bytes)} there"
                + (f" (--spool-every {plan.spool_every})" if plan.extracts else "")
                + f", and its disk has {format_bytes(disk.free_bytes)} free",
                _more_room(plan),
            )


def _tokens_here(seeds: SampleSet, processes: int, here: int) -> int:
    """The most tokens that ``here`` of the processes have together."""
    from pkt.processes import balanced

    lengths = [len(sample.tokens) for sample in seeds.samples]
    shares = (sum(lengths[item] for item in part) for part in balanced(lengths, processes))
    return sum(sorted(shares)[-here:])


def _more_room(plan: Plan) -> str:
    """What makes a spool fit that does not."""
    from pkt.config import format_bytes

    every, least = plan.least_spool
    assert plan.room is not None
    others = plan.disks[0].bytes - plan.spool_bytes  # on the disk of the spool
    if not plan.extracts:
        return (
            "make room, name another disk with --spool-dir, or take fewer or shorter examples "
            "(--max-examples, --max-tokens)"
        )
    if least + others <= plan.room.spool_free and plan.spool_bytes > least:
        return f"--spool-every {every} needs {format_bytes(least + others)}"
    return (
        f"the least is {format_bytes(least + others)}, with --spool-every {every}: make room, name "
        "another disk with --spool-dir, or take fewer or shorter seeds (--limit, --max-tokens)"
    )


def checked_every(every: int | None) -> int | None:
    """``spool_every`` as given; raises `UsageError` unless it is 1 or more."""
    if every is not None and every < 1:
        raise UsageError(f"--spool-every {every}: expected auto, or 1 or more")
    return every


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def check_device(device: str) -> None:
    """Raise `UsageError` for a device this host does not have."""
    if device != "cpu":
        import torch

        if device.split(":")[0] != "cuda" or not torch.cuda.is_available():
            raise UsageError(f"--device {device}: not available here", "use --device cpu")


def budget(max_ram: str | None, sharing: int = 1) -> tuple[int, str]:
    """The memory budget of one of the processes ``sharing`` this host, and where it comes from."""
    if max_ram and max_ram != "auto":
        return parse_bytes(max_ram), f"--max-ram {max_ram}"
    limit, source = memory_limit()
    shared = f", shared by {sharing} processes" if sharing > 1 else ""
    return int(limit * 0.9) // sharing, f"nine tenths of {source}{shared}"


def compute_dtype(model: Model, wanted: str) -> str:
    """F32 or BF16: what ``--dtype`` says, or the checkpoint's own type under ``auto``.

    float16 is computed in float32: its gradients underflow, and bfloat16 would round its weights.
    """
    names = {"float32": "F32", "bfloat16": "BF16"}
    if wanted in names:
        return names[wanted]
    if wanted != "auto":
        raise UsageError(f"--dtype {wanted}: expected auto, float32 or bfloat16")
    found = model.checkpoint.dtypes()
    if not found:
        raise IncompatibleError(f"{model.folder}: its layers hold no floating-point weights")
    return "BF16" if found[0] in ("BF16", "F8_E4M3", "F8_E5M2") else "F32"


def description(model: Model) -> dict[str, Any]:
    """What `inspect` says of a model."""
    return {
        "name": model.name,
        "folder": str(model.folder),
        "family": model.family,
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "vocabulary": model.embedding.shape[0],
        "tied_head": model.head is None,
        "dtypes": model.checkpoint.dtypes(),
        "parameters": sum(p.elements for layer in model.checkpoint.layers for p in layer.values())
        + sum(p.elements for p in model.checkpoint.outer.values()),
        "bytes": model.checkpoint.bytes,
        "shards": len(model.checkpoint.files),
    }


def _records(select: Select) -> dict[str, bool]:
    """What a strategy keeps of every layer and reads of its windows, for the plan."""
    return {
        "masks": select in ("top-weights", "random-weights"),
        "crossed": select in ("rows-cols", "consistent"),
        "sums": select == "consistent",
    }


def require_choice(option: str, value: str, kind: Any) -> None:
    """Raise `UsageError` unless ``value`` is one of the literals of ``kind``."""
    if value not in get_args(kind):
        raise UsageError(f"--{option} {value}: expected one of {', '.join(get_args(kind))}")


def shared_rows(teacher: Model, student: Model, why: str, remedy: str) -> int:
    """Tokens of the one vocabulary that both have, without rows that only pad it.

    Args:
        teacher: larger model.
        student: smaller model.
        why: the same tokenizer is needed, for the message.
        remedy: what to do otherwise.

    Raises:
        IncompatibleError: their tokenizers differ, or one has no tokenizer.json.

    """
    ours, theirs = vocabulary(student), vocabulary(teacher)
    for model, found in ((student, ours), (teacher, theirs)):
        if found is None:
            raise IncompatibleError(f"{model.folder}: no tokenizer.json to compare vocabularies by")
    assert ours is not None
    assert theirs is not None
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise IncompatibleError(
            f"{teacher.name}, {student.name}: {differing} entries of the two tokenizers differ; "
            f"{why}",
            remedy,
        )
    rows = max(ours.values(), default=-1) + 1
    return min(rows, student.embedding.shape[0], teacher.embedding.shape[0])


def same_vocabulary(teacher: Model, student: Model) -> bool:
    """Whether both tokenizers give every token the same id."""
    return not _vocabulary_problems(teacher, student)


def _vocabulary_problems(teacher: Model, student: Model) -> list[str]:
    """Same number of rows is not enough: the tokens must be the same ones."""
    ours, theirs = vocabulary(student), vocabulary(teacher)
    if ours is None or theirs is None:
        lacking = student if ours is None else teacher
        return [f"vocabulary: {lacking.folder} has no tokenizer.json to compare"]
    if ours == theirs:
        return []
    differing = len(set(ours.items()) ^ set(theirs.items()))
    return [
        f"vocabulary: {differing} entries of the two tokenizers differ; "
        "--embeddings needs the same vocabulary"
    ]


def base_name(model: Model) -> str:
    """The model as an adapter and its card name it: hub id, or folder as given."""
    return model.source if not Path(model.source).is_dir() else str(Path(model.source))


__all__ = ["check_device", "execute", "extract", "inspect", "prepare", "reading", "require_fit"]
