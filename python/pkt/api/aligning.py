"""`pkt.write_targets`: what a teacher says and thinks of the training data, for a student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.api.choices import budget, compute_dtype, require_choice
from pkt.api.device import check_device, free_device_bytes, require_device_fit
from pkt.api.fitting import reading, require_fit
from pkt.api.mapped import (
    DEFAULTS,
    Attribution,
    Interface,
    PairBy,
    aligned_texts,
    fitted_plan,
    layers_of,
    map_maker,
    mapped_plan,
    shared_vocabulary,
    states_config,
)
from pkt.api.pair_quality import spelling_of
from pkt.api.training import SPARE
from pkt.api.vocabulary import same_vocabulary, shared_rows
from pkt.batches import most_rows, shapes
from pkt.config import load_aliases
from pkt.errors import IncompatibleError, UsageError
from pkt.models import Model, load_tokenizer, open_model, vocabulary, vocabulary_sha256
from pkt.plan import Attributed, make_resident_plan, make_targets_plan
from pkt.records import IoMode, Reading, Recording, SampleSet, Template
from pkt.workplace import room

if TYPE_CHECKING:
    from pkt.methods.targeting import Aligned, States, Task

Notify = Callable[[str, int, int], None]

TOP_K = 64


def prepare_targets(
    teacher: str,
    student: str,
    data: str | Path,
    *,
    top_k: int = TOP_K,
    states: bool = False,
    interface: Interface = "hidden",
    map: str = "dual",
    pairs: str | None = None,
    critical: int = 0,
    interpolate: bool = False,
    pair_by: PairBy = "floor",
    states_dtype: str = "bfloat16",
    attribution: Attribution = "signed",
    attribution_examples: int = 32,
    fold_norm: bool = True,
    seed: int = 0,
    allow_low_coverage: bool = False,
    template: Template = "auto",
    max_tokens: int = 2048,
    max_examples: int = 1000,
    dtype: str = "auto",
    max_ram: str | None = None,
    spool_dir: str | Path | None = None,
    output_dir: str | Path = "OUT",
    online: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> Task:
    """Open everything that a pass over the training data needs, and plan it; no weight is read.

    Args:
        teacher: folder, hub id or alias.
        student: the same; its tokenizer reads the data as in training. Where the teacher has
            another one, states are all that can be written.
        data: JSONL file of training examples.
        top_k: logits kept of each answer token; 0: those of the whole vocabulary.
        states: whether mapped activations are written too; what follows is of these.
        interface: ``mlp`` or ``attn``, what that sub-layer adds to the residual stream; ``block``,
            what the layer does; ``hidden``, the state behind it; ``span``, the state behind it less
            that behind the layer paired with the student's layer below.
        map: what carries them over, of `pkt.semantics.MAPS`.
        pairs: ``T:S,…``, layers from 1; ``None``: by a rule.
        critical: so many teacher layers of highest attribution lead to pairs; 0: every student
            layer has one.
        interpolate: states between two teacher layers.
        pair_by: ``floor``: layer ⌊k L_T / L_S⌋ for student layer k; ``attribution``: the highest of
            those since the one for k − 1.
        states_dtype: stored in: bfloat16, float16 or float32.
        attribution: ``signed`` or ``abs``: the absolute value is taken of the sum, or of each
            element.
        attribution_examples: the first so many examples are attributed, and are what the maps
            ridge, procrustes and flex are fitted on.
        fold_norm: whether the final norms belong to the heads that the map is made from.
        seed: of the map ``random``.
        allow_low_coverage: accept vocabularies that share less than half of the smaller one, and
            data of which fewer than half of the answer tokens have a state.
        template: how prompt and answer become one text; ``auto`` is the paper's where the two
            tokenizers differ.
        max_tokens: longer examples are cut.
        max_examples: the first so many rows are used; 0: all.
        dtype: computed in: auto, float32 or bfloat16.
        max_ram: budget such as "8GiB"; ``None`` asks the host.
        spool_dir: where hidden states lie meanwhile; ``None``: in the output folder.
        output_dir: of `execute_targets`: the plan asks its disk for room.
        online: nothing is to be written: the teacher stays in memory beside the student, and is
            planned so.
        aliases: table of aliases; ``None`` for the built-in one.

    Raises:
        IncompatibleError: the tokenizers differ, or the teacher takes fewer tokens than an example
            has.
        PktError: and its subclasses, for each input that cannot be used.

    """
    asked = {
        "interface": interface, "map": map, "pairs": pairs, "critical": critical,
        "interpolate": interpolate, "pair_by": pair_by, "states_dtype": states_dtype,
        "attribution": attribution, "attribution_examples": attribution_examples,
        "fold_norm": fold_norm, "seed": seed, "allow_low_coverage": allow_low_coverage,
    }  # fmt: skip
    require_choice("template", template, Template)
    if top_k < 0:
        raise UsageError(f"--top-k {top_k}: expected 0 (the whole vocabulary) or more")
    unused = [name for name, value in asked.items() if value != DEFAULTS[name]]
    if unused and not states:
        raise UsageError(f"--{unused[0].replace('_', '-')}: not used without --states")
    table = load_aliases(None) if aliases is None else aliases
    big = open_model(teacher, table, "teacher")
    small = open_model(student, table, "student")
    same = not states or same_vocabulary(big, small)
    rows = _rows(big, small, same)
    digest = vocabulary_sha256(small)
    assert digest is not None  # _rows has looked
    from pkt.methods.targeting import Config, Task  # torch is loaded from here on
    from pkt.samples import read_samples
    from pkt.sweep import attention_kinds

    wanted = states_config(big, small, asked) if states else None
    tokenizers = load_tokenizer(big) if states else None, load_tokenizer(small)
    shared = None
    if states:
        shared = shared_vocabulary(big, small, tokenizers, allow_low_coverage=allow_low_coverage)
    if template == "auto" and not same:
        template = "paper"
    samples = read_samples(
        Path(data), tokenizers[1], template=template, limit=max_examples,
        max_tokens=max_tokens, positions=small.positions, spare=SPARE,
        vocabulary=small.embedding.shape[0],
    )  # fmt: skip
    aligned = None
    if same:
        _require_readable(samples, big, rows)
    else:
        theirs = read_samples(
            Path(data), tokenizers[0], template=template, limit=max_examples,
            max_tokens=max_tokens, positions=big.positions, spare=1.0,
            vocabulary=big.embedding.shape[0],
        )  # fmt: skip
        spelled = spelling_of(big, tokenizers[0]), spelling_of(small, tokenizers[1])
        aligned = aligned_texts(
            theirs, samples, spelled, Path(data), allow_low_coverage=allow_low_coverage
        )
    config = Config(min(top_k or rows, rows) if same else 0, rows, compute_dtype(big, dtype))
    options = {
        "template": samples.template, "max_tokens": max_tokens, "max_examples": max_examples,
    }  # fmt: skip
    texts = aligned.texts if aligned else samples
    results, held = _sizes(samples, config.top_k, wanted, (big, small), aligned)
    first = texts.samples[:attribution_examples]
    lengths = [len(sample.tokens) for sample in first]
    sizes = [len(sample.tokens) for sample in texts.samples]
    attributing = wanted is not None and wanted.attributing is not None
    passing = lengths if online else sizes  # a teacher in memory is streamed for attribution alone
    plan = make_targets_plan(
        big, dtype=config.dtype, tokens=sum(passing), rows=most_rows(passing),
        shapes=shapes(passing), answers=samples.loss_tokens if same and not online else 0,
        results=0 if online else results, held=0 if online else held, logits=same,
        mapped=mapped_plan(
            big, small, wanted, 0 if online else aligned.rows if aligned else samples.loss_tokens
        )
        if wanted else None,
        attributed=Attributed(sum(lengths), max(lengths)) if attributing else None,
        fitted=fitted_plan(wanted, samples, aligned),
        budget=budget(max_ram), room=room(Path(output_dir), Path(spool_dir) if spool_dir else None),
    )  # fmt: skip
    if online:
        plan = make_resident_plan(
            plan, big, small, dtypes=(config.dtype, compute_dtype(small, dtype)), lengths=sizes,
            kept=_kept(samples, results), logits=same, attributed=attributing,
            map_bytes=_map_bytes(wanted, big, small),
        )  # fmt: skip
    if wanted is None:
        return Task(big, samples, digest, plan, config, options, resident=online)
    kinds = attention_kinds(big.folder, big.layers), attention_kinds(small.folder, small.layers)
    return Task(
        big, samples, digest, plan, config, options, wanted, small, shared, aligned, kinds, online
    )


def execute_targets(
    task: Task,
    folder: Path,
    *,
    io: IoMode | Reading = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
    paired: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> Recording:
    """Run what `prepare_targets` made; a finished run with the same inputs is returned.

    ``paired`` is told of the pairs of layers where they follow from attribution, once they are
    known: teacher, student, mix, teacher_attention, student_attention, unlike.
    """
    from pkt.methods import targeting

    if not overwrite and (held := finished_targets(task, folder)):
        return held
    require_fit(task.plan)
    check_device(device)
    require_device_fit(task.plan, free_device_bytes(device))
    chosen = io if isinstance(io, Reading) else reading(task, io)
    maker = map_maker(task, chosen.mode, device, notify) if task.states else None
    return targeting.run(
        task, folder, io=chosen, device=device, overwrite=overwrite, notify=notify,
        make_map=maker, paired=paired,
    )  # fmt: skip


def finished_targets(task: Task, folder: Path) -> Recording | None:
    """What an earlier run with the inputs of ``task`` left in ``folder``, if it is whole."""
    from pkt.output import finished
    from pkt.targets import FOLDER, INDEX

    names = (*(f"{FOLDER}/{shard.file}" for shard in task.shards), f"{FOLDER}/{INDEX}")
    manifest = finished(folder, task.identity(), names)
    if manifest is None or not all((folder / FOLDER / name).exists() for name in _states(folder)):
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
    """Write what the ``teacher`` says at every answer token of ``data`` to ``output_dir``.

    Its top logits, and with ``states`` its activations, mapped to the student's width.

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


def _rows(teacher: Model, student: Model, same: bool) -> int:
    """Tokens of the vocabulary that logits are of."""
    if same:
        return shared_rows(
            teacher, student, "a teacher's logits are targets within one vocabulary only",
            "take a teacher of the student's tokenizer, or --states, which can be aligned",
        )  # fmt: skip
    found = vocabulary(student)
    for model, listed in ((student, found), (teacher, vocabulary(teacher))):
        if listed is None:
            raise IncompatibleError(f"{model.folder}: no tokenizer.json to compare vocabularies by")
    return min(max((found or {}).values(), default=-1) + 1, student.embedding.shape[0])


def _sizes(
    samples: SampleSet,
    top_k: int,
    states: States | None,
    models: tuple[Model, Model],
    aligned: Aligned | None,
) -> tuple[int, int]:
    """Bytes of all targets, and of the largest file of them."""
    from pkt.targets import KERNEL_PLACES, STORED, StatesIndex, layout, row_bytes

    teacher, student = models
    answers = [sample.loss_tokens for sample in samples.samples]
    each = row_bytes(top_k)
    files = [shard.rows * each for shard in layout(answers, top_k)]
    if states:
        index = StatesIndex(
            states.interface, states.map, states.dtype, student.hidden_size, (),
            aligned.tokens if aligned else None,
        )  # fmt: skip
        width = student.hidden_size * STORED[states.dtype].itemsize
        files += layers_of(states, student) * [s.rows * width for s in index.layout(answers, 1)]
        places = min(KERNEL_PLACES, samples.loss_tokens)
        files += teacher.layers * [4 * places * places + 128]
    return sum(files), max(files)


def _map_bytes(states: States | None, teacher: Model, student: Model) -> int:
    """Of all maps that a teacher in memory has beside it."""
    if states is None:
        return 0
    count = layers_of(states, student) if states.fitted_on else 1
    return 4 * teacher.hidden_size * student.hidden_size * count


def _kept(samples: SampleSet, results: int) -> int:
    """Bytes of targets that are in memory at once where none are written."""
    from pkt.methods.targeting.online import KEPT_BYTES

    longest = max(sample.loss_tokens for sample in samples.samples)
    return max(min(results, KEPT_BYTES), -(-results * longest // samples.loss_tokens))


def _states(folder: Path) -> list[str]:
    """Names of the files of states and kernels that the index in ``folder`` lists."""
    from pkt.targets import FOLDER, INDEX

    try:
        index = json.loads((folder / FOLDER / INDEX).read_text(encoding="utf-8"))
        held = [index.get(name) or {"files": []} for name in ("states", "kernels")]
        return [str(entry["file"]) for each in held for entry in each["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [INDEX + ", damaged"]


__all__ = ["execute_targets", "finished_targets", "prepare_targets", "write_targets"]
