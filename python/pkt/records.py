"""The values that travel between stages: frozen, without behaviour beyond their own shape.

A stage takes records and returns records, and imports no other stage; what each field means,
its unit and its index base stand here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Select = Literal[
    "window",
    "rows-cols",
    "top-weights",
    "consistent",
    "random-window",
    "random-weights",
    "orthogonal",
]
LayerRule = Literal["sensitivity", "random", "first", "last"]
Split = Literal["paper", "balanced"]
Template = Literal["auto", "chat", "paper", "none"]
IoMode = Literal["auto", "mmap", "buffered", "direct"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One text as a model reads it: a seed, a training example, a text to evaluate on.

    ``loss_mask[i]`` says that the prediction of token ``i`` (made at position ``i - 1``) counts
    in the loss; ``loss_mask[0]`` is always false.
    """

    name: str  #: "seeds.jsonl:12", for messages
    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    cut: bool = False  #: shortened to --max-tokens or to the teacher's positions

    @property
    def loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The samples of a file, and the hash of what was read."""

    samples: tuple[Sample, ...]
    sha256: str  #: over token ids and loss masks, so it changes with tokenizer and template too
    template: str  #: the template that `auto` came to
    masked: tuple[str, ...] = ()  #: names of rows left out: cut before their answer began

    @property
    def tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def longest(self) -> int:
        return max((len(sample.tokens) for sample in self.samples), default=0)

    @property
    def loss_tokens(self) -> int:
        return sum(sample.loss_tokens for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Projection:
    """One logical projection of a decoder layer: a run of rows of one linear module.

    Logical rows are blocks of ``block`` stored rows, the first at ``start``, each ``stride`` after
    the one before; a plain module is one block.
    """

    role: str  #: q, k, v, o, gate, up, down, or the module's own suffix
    module: str  #: suffix below the layer, e.g. "self_attn.q_proj"
    part: str | None  #: "q" for a part of a fused module, else None
    out_features: int
    in_features: int
    start: int = 0
    block: int = 0  #: rows a block; 0: all rows are one block
    stride: int = 0  #: distance of two blocks' first rows


@dataclass(frozen=True, slots=True)
class Window:
    """What was chosen of one teacher matrix for one student matrix.

    ``rows`` and ``cols`` are half-open ranges for contiguous windows, index lists for
    ``rows-cols`` and ``consistent`` (where embedding and head keep a range of all rows), and
    ``None`` for single weights, where ``mask_sha256`` is the SHA-256 of the chosen flat row-major
    indices (ascending, little-endian u64). All indices count in the logical (expanded, unfused)
    matrix. ``score`` is Σ S over what is chosen; for a layer's matrix under ``consistent`` a number
    it does not exceed (`pkt.consistent.subnetwork_window`).
    """

    teacher: str
    score: float
    rows: tuple[int, ...] | None = None
    cols: tuple[int, ...] | None = None
    mask_sha256: str | None = None
    kv_repeat: int = 1
    crossed: bool = False  #: cols are an index list, and so are rows unless ``every_row``
    every_row: bool = False  #: rows are a range even so

    @property
    def row_indices(self) -> Sequence[int]:
        listed = self.crossed and not self.every_row
        return self.rows or () if listed else range(*(self.rows or (0,)))

    @property
    def col_range(self) -> range:
        first, last = self.col_indices[0], self.col_indices[-1]
        return range(first, last + 1)

    @property
    def col_indices(self) -> Sequence[int]:
        return self.cols or () if self.crossed else range(*(self.cols or (0,)))


@dataclass(frozen=True, slots=True)
class LowRank:
    """``B @ A``, a change of one weight: B is (out_features, r), A is (r, in_features).

    Of an embedding (vocabulary, hidden), which PEFT stores the other way round, it is the change
    of the transposed weight: B is (hidden, r), A is (r, vocabulary).
    """

    b: Any
    a: Any


@dataclass(frozen=True, slots=True)
class Factors:
    """``B @ A`` of rank r: B is (out_features, r), A is (r, in_features), both float32.

    ``singular_values`` are the window's leading ones; ``residual`` is ‖W − BA‖_F.
    """

    b: Any
    a: Any
    singular_values: tuple[float, ...]
    residual: float
    norm: float  #: ‖W‖_F


@dataclass(frozen=True, slots=True)
class TopLogits:
    """What a teacher says at n answer tokens: its k largest logits and the sum over all of them.

    ``logits`` are (n, k) float32, descending, of equal ones the lower id first; ``ids`` (n, k)
    int32; ``logsumexp`` (n,) float64, the logarithm of Σ exp over the whole vocabulary.
    """

    logits: Any
    ids: Any
    logsumexp: Any


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A teacher layer whose states, mapped, are held against a student layer's; both from 1.

    With ``mix`` λ > 0 the state is ``(1 − λ) h_teacher + λ h_{teacher + 1}``.
    """

    teacher: int
    student: int
    mix: float = 0.0


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """The tokens that two vocabularies have in common, and how many of each that is."""

    pairs: Sequence[tuple[int, int]]  #: (teacher id, student id), by teacher id
    teacher_tokens: int  #: that the teacher's tokenizer names and its head has a row for
    student_tokens: int
    same: bool  #: both tokenizers give every token the same id

    @property
    def coverage(self) -> float:
        """Share of the smaller vocabulary that the other one has too."""
        return len(self.pairs) / max(1, min(self.teacher_tokens, self.student_tokens))


@dataclass(frozen=True, slots=True)
class PlanPart:
    """One share of memory, disk or reading, in bytes."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What the disks have free for a run, in bytes, what it holds there already included."""

    output_dir: str
    output_free: int
    spool_dir: str | None  #: as given; None: the spool lies in OUT/.work
    spool_free: int
    shared: bool  #: both on one disk
    spool_in_memory: bool = False  #: that "disk" is memory (/dev/shm): what lies there counts
    spool_held: int = 0  #: of what is free there, what an unfinished run has already taken
    sharing: int = 1  #: processes of the run on this host


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What a run has on one disk at its largest, and what that disk has room for."""

    folder: str
    bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will hold, read and write, worked out from headers alone."""

    budget_bytes: int
    budget_source: str  #: "--max-ram" or where `auto` found it
    parts: tuple[PlanPart, ...]  #: anonymous memory at the peak, part by part
    smallest_bytes: int  #: the least --max-ram that this run fits in
    slots: int  #: layer slots: 1 reads and computes in turn, 2 reads ahead
    scores: Literal["layer", "matrix"]  #: resident for a whole layer, or one matrix at a time
    read_bytes: int  #: from the teacher, in all
    spool_bytes: int  #: largest size of the spool: hidden states and gradients, X and dY
    adapter_bytes: int
    passes: int = 2  #: times that the layers are gone through: targets 1, to fit 1, to attribute 2
    extracts: bool = True  #: false: targets are written
    record_bytes: int = 0  #: what finished layers leave in OUT/.work, wherever the spool lies
    spool_every: int = 1  #: every k-th layer's inputs are kept on the disk
    recomputed_layers: int = 0  #: run forward once more, as their inputs were not kept
    flop: int = 0  #: multiplications and additions of the sweep, attention not counted
    room: Room | None = None  #: None: not asked for
    least_spool: tuple[int, int] = (1, 0)  #: the k whose spool is the smallest, and its bytes
    device_parts: tuple[PlanPart, ...] = ()  #: of a CUDA device's memory at its peak, with --device

    @property
    def peak_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @property
    def device_bytes(self) -> int:
        return sum(part.bytes for part in self.device_parts)

    @property
    def disks(self) -> tuple[DiskNeed, ...]:
        """The disk of the spool, then that of OUT where it is another one."""
        if self.room is None:
            return ()
        room, kept = self.room, self.record_bytes + self.adapter_bytes
        work = f"{room.output_dir}/.work"
        place = room.spool_dir or work
        if room.shared:
            return (DiskNeed(place, self.spool_bytes + kept, room.spool_free),)
        return (
            DiskNeed(place, self.spool_bytes, room.spool_free),
            DiskNeed(work, kept, room.output_free),
        )


@dataclass(frozen=True, slots=True)
class AlignPlan:
    """What a pair's quality report will hold, read and write, worked out from headers alone."""

    budget_bytes: int
    budget_source: str  #: "--max-ram" or where `auto` found it
    parts: tuple[PlanPart, ...]  #: anonymous memory at the peak, part by part
    smallest_bytes: int  #: the least --max-ram that it fits in
    slots: int  #: layer slots: 1 reads and computes in turn, 2 reads ahead
    read_bytes: int  #: of both models, at most
    disk_bytes: int  #: hidden states, at most
    disk: DiskNeed | None = None  #: None: not asked for

    @property
    def peak_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """How a teacher's files are read, why so, and what was measured for it."""

    mode: IoMode
    reason: str
    rates: Mapping[str, float] = field(default_factory=dict)  #: GB/s by mode, where measured


@dataclass(frozen=True, slots=True)
class MatchRow:
    """One row of `inspect`'s table: module / teacher shape / student shape / action."""

    module: str
    teacher_shape: tuple[int, ...] | None
    student_shape: tuple[int, ...] | None
    action: str
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `pkt inspect` found: both models, the match between them, and the plan."""

    teacher: Mapping[str, Any]
    student: Mapping[str, Any] | None
    rows: tuple[MatchRow, ...]
    plan: Plan
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heat:
    """Mean score in each bin of a grid over one logical matrix, for pictures."""

    bins: Any  #: (row bins, column bins) float32
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class Extraction:
    """A finished `pkt extract`: where it is, what the manifest says, what the run cost."""

    folder: Path
    manifest: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """Finished targets of a teacher: where they are, what the manifest says, what they cost."""

    folder: Path
    manifest: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Alignment:
    """A pair's quality report: what was found, what it cost, and where it is, if it was kept."""

    found: Mapping[str, Any]  #: the manifest
    run: Mapping[str, Any]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """A finished `pkt train`: where it is, what the manifest says, what it cost, its metrics."""

    folder: Path
    manifest: Mapping[str, Any]
    run: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]  #: by step: loss, grad_norm, learning_rate, eval_loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished `pkt eval`: where it is, its table and scores, and what the run cost."""

    folder: Path
    results: Mapping[str, Any]  #: results.json
    manifest: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Export:
    """A finished `pkt export`: where it is, what the manifest says, what it cost."""

    folder: Path
    manifest: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def errors(self) -> Mapping[str, float]:
        """By module, what recompression or rounding took: ‖Δ' − Δ‖_F / ‖Δ‖_F."""
        found: Mapping[str, float] = self.manifest["errors"]
        return found
