"""The states of `pkt.write_targets`: layers, activation, map; a text as two tokenizers read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pkt.api.choices import require_choice
from pkt.api.pair_quality import spelling_of
from pkt.batches import most_rows
from pkt.errors import DataError, IncompatibleError, UsageError
from pkt.models import Model
from pkt.pairing import (
    all_sources,
    floor_pairs,
    given_pairs,
    interpolated_pairs,
    most_kept,
    span_starts,
)
from pkt.records import Sample, SampleSet, SharedTokens

if TYPE_CHECKING:
    from pkt.methods.targeting import Aligned, States, Task
    from pkt.plan import Fitted, Mapped

Interface = Literal["mlp", "attn", "block", "hidden", "span"]
PairBy = Literal["floor", "attribution"]
Attribution = Literal["signed", "abs"]
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
#: What `prepare_targets` takes of states; any of them is refused without ``states``.
DEFAULTS: dict[str, Any] = {
    "interface": "hidden", "map": "dual", "pairs": None, "critical": 0, "interpolate": False,
    "pair_by": "floor", "states_dtype": "bfloat16", "attribution": "signed",
    "attribution_examples": 32, "fold_norm": True, "seed": 0, "allow_low_coverage": False,
}  # fmt: skip


def states_config(teacher: Model, student: Model, given: dict[str, Any]) -> States:
    """The options of states, found to agree with each other and with both models.

    Args:
        teacher: larger model.
        student: whose layers are paired.
        given: by the names of `DEFAULTS`.

    Raises:
        UsageError: one is none that there is, or two contradict each other.
        IncompatibleError: the teacher has fewer layers than the student.

    """
    from pkt.methods.targeting import Attributing, States
    from pkt.semantics import MAPS

    require_choice("interface", given["interface"], Interface)
    require_choice("pair-by", given["pair_by"], PairBy)
    require_choice("attribution", given["attribution"], Attribution)
    critical, examples, name = given["critical"], given["attribution_examples"], given["map"]
    if given["states_dtype"] not in _DTYPES:
        raise UsageError(
            f"--states-dtype {given['states_dtype']}: expected one of {', '.join(_DTYPES)}"
        )
    if name not in MAPS:
        raise UsageError(f"--map {name}: expected one of {', '.join(MAPS)}")
    if not 0 <= critical <= teacher.layers:
        raise UsageError(f"--critical {critical}: expected 0 to {teacher.layers} layers")
    if examples < 1:
        raise UsageError(f"--attribution-examples {examples}: expected 1 or more")
    by_attribution = given["pair_by"] == "attribution"
    if given["pairs"] and (critical or by_attribution or given["interpolate"]):
        raise UsageError("--pairs names the layers: leave out --critical, --pair-by, --interpolate")
    if by_attribution and (critical or given["interpolate"]):
        raise UsageError("--pair-by attribution: leave out --critical and --interpolate")
    depths = teacher.layers, student.layers
    pairs = None
    if given["pairs"]:
        pairs = given_pairs(given["pairs"], *depths)
    else:
        floor = floor_pairs(*depths)
        if not critical and not by_attribution:
            pairs = interpolated_pairs(*depths) if given["interpolate"] else floor
    if pairs and given["interface"] == "span":
        span_starts(pairs, *depths)
    wanted = pairs is None or MAPS[name].needs == "channels"
    attributing = Attributing(examples, given["attribution"] == "abs") if wanted else None
    return States(
        given["interface"], name, _DTYPES[given["states_dtype"]], pairs, critical,
        bool(given["interpolate"]), attributing, given["fold_norm"], given["seed"],
        examples if MAPS[name].fitted else 0,
    )  # fmt: skip


def shared_vocabulary(
    teacher: Model, student: Model, tokenizers: tuple[Any, Any], *, allow_low_coverage: bool
) -> SharedTokens:
    """The tokens whose rows of both heads a map is made from.

    Raises:
        IncompatibleError: less than half of the smaller vocabulary, and that is not allowed.

    """
    from pkt.vocabularies import shared_tokens

    theirs, ours = (
        spelling_of(model, tokenizer)
        for model, tokenizer in zip((teacher, student), tokenizers, strict=True)
    )
    return shared_tokens(
        theirs, ours, teacher.embedding.shape[0], student.embedding.shape[0],
        allow_low_coverage=allow_low_coverage,
    )  # fmt: skip


def aligned_texts(
    theirs: SampleSet,
    ours: SampleSet,
    spelled: tuple[Any, Any],
    path: Path,
    *,
    allow_low_coverage: bool,
) -> Aligned:
    """Where the teacher's reading of each example ends together with the student's.

    An answer token of the student has a state where both tokenizations end together just before it.

    Args:
        theirs: as the teacher reads the file.
        ours: as the student does.
        spelled: what the tokens of either stand for.
        path: of the file, for messages.
        allow_low_coverage: accept less than half of the answer tokens.

    Raises:
        DataError: no answer token has a state.
        IncompatibleError: less than half of them have, and that is not allowed.

    """
    from pkt.methods.targeting import Aligned
    from pkt.samples import sample_set
    from pkt.vocabularies import common_ends

    by_name = {sample.name: sample for sample in theirs.samples}
    texts: list[Sample] = []
    text_of: list[int | None] = []
    positions: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    for sample in ours.samples:
        text = by_name.get(sample.name)
        ends = common_ends(text.tokens, sample.tokens, *spelled) if text else []
        teacher_at = {student: teacher for teacher, student in ends}
        answers = [at for at, counts in enumerate(sample.loss_mask) if counts]
        found = [
            (number, teacher_at[at - 1])
            for number, at in enumerate(answers)
            if at - 1 in teacher_at
        ]
        tokens.append(tuple(number for number, _ in found))
        text_of.append(len(texts) if found else None)
        if text and found:
            texts.append(text)
            positions.append(tuple(at for _, at in found))
    made = Aligned(
        sample_set(texts, theirs.template), tuple(text_of), tuple(positions), tuple(tokens)
    )
    if not made.rows:
        raise DataError(
            f"{path}: no answer token before which both tokenizations of its text end together",
            "take another --template, or data that both tokenizers read as the same text",
        )
    share = made.rows / ours.loss_tokens
    if share < 0.5 and not allow_low_coverage:
        raise IncompatibleError(
            f"{path}: before only {share:.1%} of the {ours.loss_tokens} answer tokens both "
            "tokenizations end together; expected at least half",
            "--allow-low-coverage goes on with these",
        )
    return made


def mapped_plan(teacher: Model, student: Model, states: States, rows: int) -> Mapped:
    """What the plan counts of states, ``rows`` of each layer."""
    from pkt.plan import Mapped
    from pkt.semantics.rows import CHUNK_ELEMENTS
    from pkt.targets import KERNEL_PLACES

    if states.pairs is not None:
        terms = all_sources(states.pairs, states.interface, teacher.layers, student.layers)
        kept = most_kept(terms, sub_layers=states.interface in ("mlp", "attn"))
    else:  # the most that any pairs need
        kept = 4 if states.interpolate else 2
    readings = {"cosine": 3, "embedding": 3, "dual": 2}.get(states.map, 0)
    return Mapped(student, rows, kept, readings, CHUNK_ELEMENTS, min(KERNEL_PLACES, rows))


def fitted_plan(
    states: States | None, samples: SampleSet, aligned: Aligned | None
) -> Fitted | None:
    """What the plan counts of maps that are fitted on both models' activations, if they are."""
    from pkt.methods.targeting.fitting import STATES
    from pkt.plan import Fitted

    if states is None or not states.fitted_on:
        return None
    theirs = aligned.texts.samples if aligned else samples.samples
    texts = aligned.text_of if aligned else range(len(samples.samples))
    ours = [
        sample
        for sample, text in zip(samples.samples, texts, strict=True)
        if text is not None and text < states.fitted_on
    ]
    lengths = [
        [len(sample.tokens) for sample in each] for each in (theirs[: states.fitted_on], ours)
    ]
    places = min(STATES, sum(sample.loss_tokens for sample in ours))
    return Fitted(
        (sum(lengths[0]), sum(lengths[1])), (most_rows(lengths[0]), most_rows(lengths[1])), places
    )


def layers_of(states: States, student: Model) -> int:
    """How many student layers are given states, at most."""
    if states.pairs is not None:
        return len(states.pairs)
    return min(states.critical, student.layers) if states.critical else student.layers


def map_maker(
    task: Task, io: str, device: str, notify: Callable[[str, int, int], None]
) -> Callable[[Path], tuple[Any, dict[str, Any]]]:
    """What makes the map of a task, from heads or embeddings where it needs them."""
    from pkt.methods.semalign.heads import open_heads, pair_maps
    from pkt.semantics import MAPS, Evidence

    def make(folder: Path) -> tuple[Any, dict[str, Any]]:
        states, student, shared = task.states, task.student, task.shared
        assert states
        assert student
        assert shared
        kind = MAPS[states.map]
        if kind.needs == "sizes":
            sizes = task.teacher.hidden_size, student.hidden_size
            return kind.make(Evidence(sizes, seed=states.seed)).float(), {}
        opened = partial(open_heads, task.teacher, student, shared, io=io, device=device)
        made = pair_maps(
            [states.map], opened(fold_norm=states.fold_norm), partial(opened, end="embedding"),
            folder, seed=states.seed, notify=partial(notify, "maps"),
        )  # fmt: skip
        found = dict(made.heads)
        if made.self_cosine:
            found["self_cosine"] = made.self_cosine
        return made.maps[states.map], found

    return make
