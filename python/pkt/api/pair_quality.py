"""`pkt inspect --align` as functions: the quality report of a pair of models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.choices import budget, compute_dtype, require_choice
from pkt.api.device import check_device
from pkt.batches import most_rows
from pkt.config import MIB, format_bytes, load_aliases
from pkt.errors import BudgetError, DataError, IncompatibleError, UsageError
from pkt.models import Model, load_tokenizer, open_model
from pkt.pairing import floor_pairs
from pkt.plan import make_align_plan
from pkt.records import Alignment, AlignPlan, IoMode, SampleSet, Template
from pkt.workplace import room

if TYPE_CHECKING:
    from pkt.methods.semalign import QualityTask
    from pkt.methods.semalign.task import Texts
    from pkt.vocabularies import Spelling

Notify = Callable[[str, int, int], None]

_STORIES = "data/demo/stories_seeds.jsonl"
_RESULTS = ("report", "maps")


def prepare_quality(
    teacher: str,
    student: str,
    *,
    seeds: str | Path | None = None,
    maps: Sequence[str] | None = None,
    fold_norm: bool = True,
    allow_low_coverage: bool = False,
    template: Template = "auto",
    max_tokens: int = 512,
    limit: int = 32,
    max_ram: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    spool_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    aliases: Mapping[str, str] | None = None,
) -> QualityTask:
    """Open everything a pair's quality report needs and plan it; no weight is read.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        seeds: JSONL file; ``None``: built-in stories.
        maps: names of `pkt.semantics.MAPS`, but flex; ``None``: cosine, dual and the controls.
        fold_norm: whether the final norms belong to the heads.
        allow_low_coverage: accept vocabularies that share less than half of the smaller one.
        template: how prompt and answer become one text; ``auto`` is the paper's where the two
            tokenizers differ.
        max_tokens: longer texts are cut.
        limit: first so many rows; 0: all.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        dtype: auto, float32 or bfloat16.
        seed: of the map ``random`` and of the probes.
        spool_dir: where hidden states lie meanwhile.
        output_dir: where the report will be kept, if anywhere.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        PktError: and its subclasses, for each input that cannot be used.

    """
    require_choice("template", template, Template)
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student")
    pairs = floor_pairs(big.layers, small.layers)
    from pkt.methods.semalign import QualityTask  # torch is loaded from here on
    from pkt.methods.semalign.task import LENS_STATES, STATES
    from pkt.samples import read_samples
    from pkt.semantics import DEFAULT_MAPS, MAPS
    from pkt.semantics.rows import CHUNK_ELEMENTS
    from pkt.vocabularies import shared_tokens

    names = tuple(dict.fromkeys(maps or DEFAULT_MAPS))
    usable = [name for name in MAPS if MAPS[name].needs != "channels"]  # nothing is attributed here
    for name in names:
        if name not in usable:
            raise UsageError(f"--map {name}: expected some of {', '.join(usable)}")
    tokenizers = [load_tokenizer(model) for model in (big, small)]
    spelled = [spelling_of(*each) for each in zip((big, small), tokenizers, strict=True)]
    shared = shared_tokens(
        spelled[0], spelled[1], big.embedding.shape[0], small.embedding.shape[0],
        allow_low_coverage=allow_low_coverage,
    )  # fmt: skip
    if template == "auto" and not shared.same:
        template = "paper"
    path = Path(seeds) if seeds else Path(str(resources.files("pkt") / _STORIES))
    read = [
        read_samples(
            path, tokenizer, template=template, limit=limit, max_tokens=max_tokens,
            positions=model.positions, vocabulary=model.embedding.shape[0],
        )
        for model, tokenizer in zip((big, small), tokenizers, strict=True)
    ]  # fmt: skip
    theirs, ours = _texts(read[0], read[1], spelled[0], spelled[1], path)
    dtypes = compute_dtype(big, dtype), compute_dtype(small, dtype)
    place = Path(spool_dir or output_dir or tempfile.gettempdir())
    plan = make_align_plan(
        big, small, dtypes=dtypes, maps=len(names), tokens=(read[0].tokens, read[1].tokens),
        rows=(_rows(read[0]), _rows(read[1])), states=STATES, lens_states=LENS_STATES,
        chunk_elements=CHUNK_ELEMENTS, budget=budget(max_ram),
        disk=(str(place), room(place, None).output_free),
    )  # fmt: skip
    options = {"template": read[0].template, "max_tokens": max_tokens, "limit": limit}
    return QualityTask(
        big, small, shared, read[0], theirs, ours, pairs, names, fold_norm, dtypes, plan, options,
        seed,
    )  # fmt: skip


def align_quality(
    teacher: str,
    student: str,
    output_dir: str | Path | None = None,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    spool_dir: str | Path | None = None,
    **options: Any,
) -> Alignment:
    """Measure how well a pair's maps carry what the teacher says; `prepare_quality`'s options.

    Args:
        teacher: folder, hub id or alias.
        student: the same.
        output_dir: for report, maps and manifest; ``None``: nothing is kept.
        io: how files are read; auto: mapped.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run left there.
        notify: told of (phase, steps done, steps in all).
        spool_dir: where hidden states lie meanwhile.
        **options: of `prepare_quality`.

    Raises:
        PktError: and its subclasses; `BudgetError` before anything is read.

    """
    task = prepare_quality(teacher, student, output_dir=output_dir, spool_dir=spool_dir, **options)
    return execute_quality(
        task, None if output_dir is None else Path(output_dir), io=io, device=device,
        overwrite=overwrite, notify=notify, spool_dir=spool_dir,
    )  # fmt: skip


def execute_quality(
    task: QualityTask,
    folder: Path | None,
    *,
    io: IoMode = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    spool_dir: str | Path | None = None,
    notify: Notify = lambda phase, done, total: None,
) -> Alignment:
    """Run what `prepare_quality` made; a finished run with the same inputs is returned."""
    from pkt.methods.semalign import run_quality
    from pkt.output import finished

    if folder and not overwrite and (kept := finished(folder, task.identity(), _RESULTS)):
        return Alignment(kept, json.loads((folder / "pkt_run.json").read_text("utf-8")), folder)
    require_quality_fit(task.plan)
    check_device(device)
    return run_quality(
        task, folder, io="mmap" if io == "auto" else io, device=device, overwrite=overwrite,
        spool_dir=Path(spool_dir) if spool_dir else None, notify=notify,
    )  # fmt: skip


def require_quality_fit(plan: AlignPlan) -> None:
    """Raise `BudgetError` with the smallest setting unless the plan fits memory and disk."""
    if not plan.fits:
        raise BudgetError(
            f"this report holds {format_bytes(plan.peak_bytes)} at its peak; {plan.budget_source} "
            f"allows {format_bytes(plan.budget_bytes)}",
            f"the smallest setting that fits is --max-ram {plan.smallest_bytes // MIB}MiB",
        )
    if plan.disk and plan.disk.bytes > plan.disk.free_bytes:
        raise BudgetError(
            f"{plan.disk.folder}: this report writes {format_bytes(plan.disk.bytes)} there, and "
            f"its disk has {format_bytes(plan.disk.free_bytes)} free",
            "name another disk with --spool-dir, or take fewer or shorter texts (--limit, "
            "--max-tokens)",
        )


def spelling_of(model: Model, tokenizer: Any) -> Spelling:
    """What the tokens of a model's tokenizer stand for.

    Raises:
        IncompatibleError: it has no tokenizer.json.

    """
    from pkt.vocabularies import spelling

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise IncompatibleError(
            f"{model.folder}: its tokenizer has no tokenizer.json to compare",
            "convert it with transformers' convert_slow_tokenizer",
        )
    return spelling(json.loads(backend.to_str()))


def _rows(samples: SampleSet) -> int:
    return most_rows([len(sample.tokens) for sample in samples.samples])


def _texts(
    theirs: SampleSet, ours: SampleSet, read: Spelling, other: Spelling, path: Path
) -> tuple[Texts, Texts]:
    """The places that both models are looked at: evenly spread, as many as are kept.

    A place is where both tokenizations end together, before a token that counts in the loss. The
    first token of a text is none: models park attention there.
    """
    from pkt.methods.semalign.task import STATES, Texts
    from pkt.similarity import LEAST_STATES
    from pkt.vocabularies import common_ends

    places = [
        (number, *pair)
        for number, (a, b) in enumerate(zip(theirs.samples, ours.samples, strict=True))
        for pair in common_ends(a.tokens, b.tokens, read, other)
        if min(pair) > 0 and pair[0] + 1 < len(a.tokens) and a.loss_mask[pair[0] + 1]
    ]
    if len(places) < 2 * LEAST_STATES:
        raise DataError(
            f"{path}: expected at least {2 * LEAST_STATES} places where both tokenizations end "
            f"together, found {len(places)}",
            "give more or longer texts with --seeds, or another --template",
        )
    count = min(STATES, len(places))
    kept = [places[index * len(places) // count] for index in range(count)]

    def texts(samples: SampleSet, side: int) -> Texts:
        positions: list[list[int]] = [[] for _ in samples.samples]
        for place in kept:
            positions[place[0]].append(place[1 + side])
        return Texts(samples.samples, tuple(map(tuple, positions)))

    return texts(theirs, 0), texts(ours, 1)
