"""What a teacher says and thinks at each answer token, on the disk, for a student to learn.

A folder of targets holds shards of whole rows, one row an answer token in the order of the data,
and ``index.json`` that says which examples are where. Both are of the position that predicts the
token. Top logits are exact: float32 as they were computed, their log-sum-exp in float64; the tail
that is left out is known by its probability. What only pads a vocabulary (rows beyond the
tokenizer's) counts in neither. States are mapped to the student's width and rounded to one type,
and have files of their own, for each student layer that is paired.

=============  ======  ===============  ====================================================
tensor         dtype   shape            content
=============  ======  ===============  ====================================================
``logits``     F32     (rows, k)        the k largest, descending; of equal ones the lower id
``ids``        I32     (rows, k)        their tokens
``logsumexp``  F64     (rows,)          of the whole vocabulary, summed in float64
``states``     BF16 …  (rows, D_S)      ``M a``, a the teacher's activation
``kernel``     F32     (n, n)           of a teacher layer at n places (`pkt.similarity.kernel`)
=============  ======  ===============  ====================================================

Where the two models have different tokenizers there are no logits, and states only of those answer
tokens before which both tokenizations of the text end together; the index lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pkt.errors import CheckpointError, IncompatibleError, PktError
from pkt.records import LayerPair, TopLogits

FOLDER = "targets"  # of the shards and their index, in the folder of a run
INDEX = "index.json"
SHARD_BYTES = 64 << 20  # a shard ends with the example that reaches it
BLOCK_ELEMENTS = 1 << 20  # logits ranked and summed at once
KERNEL_EXAMPLES, KERNEL_PLACES = 32, 256  # the first so many texts, and answer tokens of them
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # states


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, and the run of examples in it."""

    file: str
    first: int  #: example
    examples: int
    rows: int  #: answer tokens


@dataclass(frozen=True, slots=True)
class StatesIndex:
    """What ``index.json`` says of the states."""

    interface: str  #: which activation: mlp, attn, block, hidden or span
    map: str
    dtype: str  #: key of `STORED`
    width: int  #: D_S
    pairs: tuple[LayerPair, ...]
    aligned: tuple[tuple[int, ...], ...] | None = None  #: answer tokens with a row; None: all

    def rows(self, answers: Sequence[int]) -> list[int]:
        """Rows of each example."""
        return list(answers) if self.aligned is None else [len(tokens) for tokens in self.aligned]

    def layout(self, answers: Sequence[int], student_layer: int) -> list[Shard]:
        """The shards of one student layer."""
        each = self.width * STORED[self.dtype].itemsize
        return _shards(f"states-{student_layer:05d}", self.rows(answers), each)


def row_bytes(top_k: int) -> int:
    """Bytes that one answer token takes."""
    return 8 * top_k + 8


def layout(answers: Sequence[int], top_k: int) -> list[Shard]:
    """The shards of examples with these numbers of answer tokens: by their sizes alone.

    There are none where no logit is kept (k = 0).
    """
    return _shards("logits", answers, row_bytes(top_k)) if top_k else []


def _shards(name: str, rows_of: Sequence[int], each: int) -> list[Shard]:
    runs: list[tuple[int, int, int]] = []
    first = rows = 0
    for number, count in enumerate(rows_of):
        rows += count
        if rows * each >= SHARD_BYTES or number == len(rows_of) - 1:
            runs.append((first, number + 1 - first, rows))
            first, rows = number + 1, 0
    return [
        Shard(f"{name}-{number:05d}-of-{len(runs):05d}.safetensors", *run)
        for number, run in enumerate(runs, 1)
    ]


def top_logits(logits: torch.Tensor, top_k: int, vocabulary: int) -> TopLogits:
    """The ``top_k`` largest of the first ``vocabulary`` logits of each row, and their log-sum-exp.

    Ties go to the lower id: the order is that of (value, −id), which no two tokens share.

    Args:
        logits: (n, V) float32, finite.
        top_k: k, at most ``vocabulary``.
        vocabulary: at most V; what is beyond is padding.

    Returns:
        tensors on the CPU.

    """
    found: list[tuple[torch.Tensor, ...]] = []
    last = vocabulary - 1
    reversed_ids = last - torch.arange(vocabulary, device=logits.device)
    for block in logits[:, :vocabulary].split(max(1, BLOCK_ELEMENTS // vocabulary)):
        bits = (block + 0.0).view(torch.int32)  # −0 becomes 0, which it equals
        ranks = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the floats
        keys = (ranks.long() << 32) | reversed_ids
        ids = last - (keys.topk(top_k, sorted=True).values & 0xFFFFFFFF)
        total = block.double().logsumexp(-1)
        found.append((block.gather(-1, ids).cpu(), ids.int().cpu(), total.cpu()))
    return TopLogits(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def tail(top: TopLogits) -> torch.Tensor:
    """Probability (n,) of all other tokens, float64: 1 − Σ exp(logit − logsumexp), at least 0."""
    inside: torch.Tensor = (top.logits.double() - top.logsumexp[:, None]).exp().sum(-1)
    return (1 - inside).clamp_min(0)


def pack(parts: Iterable[TopLogits]) -> bytes:
    """The rows as one safetensors file."""
    listed = list(parts)
    columns = {
        name: torch.cat([getattr(part, name) for part in listed])
        for name in ("logits", "ids", "logsumexp")
    }
    data: bytes = save(columns, metadata={"format": "pt"})
    return data


def stored_states(states: torch.Tensor, dtype: str) -> tuple[torch.Tensor, float]:
    """States (n, D_S) as they are kept, and the largest relative error ‖x̃ − x‖ / ‖x‖ of a row.

    Raises:
        PktError: one is too large for the type.

    """
    kept = states.to(STORED[dtype])
    if not bool(kept.isfinite().all()):
        raise PktError(
            f"a mapped state of {float(states.abs().max()):.3g} cannot be stored as {dtype}",
            "take --states-dtype bfloat16 or float32",
        )
    lengths = states.double().norm(dim=-1)
    errors = (kept.double() - states.double()).norm(dim=-1) / lengths.clamp_min(1e-300)
    return kept, float(errors.max()) if len(errors) else 0.0


def pack_states(parts: Sequence[torch.Tensor]) -> bytes:
    """The rows of some examples as one safetensors file."""
    data: bytes = save({"states": torch.cat(list(parts))}, metadata={"format": "pt"})
    return data


def index_text(
    shards: Sequence[tuple[Shard, str]],
    answers: Sequence[int],
    top_k: int,
    states: StatesIndex | None = None,
    files: Sequence[tuple[int, Shard, str]] = (),
    kernels: Mapping[str, Any] | None = None,
) -> str:
    """``index.json``.

    Args:
        shards: of logits, with the SHA-256 of each file.
        answers: answer tokens of each example.
        top_k: k; 0 where no logits are kept.
        states: what the states are, if there are any.
        files: student layer, shard and SHA-256 of each file of states.
        kernels: ``places`` and ``files`` of the teacher's kernels, if there are any.

    """
    logits = [{**asdict(shard), "sha256": digest} for shard, digest in shards]
    found = {"format": 1, "top_k": top_k, "logits": logits, "answers": list(answers)}
    if states:
        listed = [
            {"student": layer, **asdict(shard), "sha256": digest} for layer, shard, digest in files
        ]
        found["states"] = {**asdict(states), "files": listed}
    if kernels:
        found["kernels"] = kernels
    return json.dumps(found) + "\n"


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """How the teacher's states at some places lie to one another, layer by layer."""

    layers: torch.Tensor  #: (L_T, n, n) float32
    places: tuple[tuple[int, int], ...]  #: example, and which of its answer tokens


class Targets:
    """The rows of a finished folder, example by example; its files are mapped, not loaded.

    Args:
        folder: that holds ``index.json``.

    Raises:
        CheckpointError: a file is missing, damaged, or not the one that was written.

    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        try:
            text = path.read_bytes()
            index = json.loads(text)
            self.top_k = int(index["top_k"])  #: k; 0: there are no logits
            self.answers = [int(count) for count in index["answers"]]  #: tokens of each example
            files = [(Shard(**_shard(entry)), str(entry["sha256"])) for entry in index["logits"]]
            self._index, held = _states_of(index.get("states"))
            self._places, kernels = _kernels_of(index.get("kernels"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"{type(error).__name__} {error}") from error
        self.sha256 = hashlib.sha256(text).hexdigest()  #: of the index, which holds the shards'
        if [shard for shard, _ in files] != layout(self.answers, self.top_k):
            raise _damaged(path, "its shards are not those of its examples")
        k = self.top_k
        columns = {"logits": [k], "ids": [k], "logsumexp": []}
        self._logits = _Rows(folder, files, self.answers, columns)
        self._states: dict[int, _Rows] = {}
        shape = {"kernel": [len(self._places)] * 2}
        self._kernels = [_opened(folder / name, digest, shape) for name, digest in kernels]
        if self._index is None:
            return
        rows = self._index.rows(self.answers)
        if len(rows) != len(self.answers) or not _within(self._index.aligned, self.answers):
            raise _damaged(path, "its aligned answer tokens are not those of its examples")
        for pair in self._index.pairs:
            own = [(shard, digest) for layer, shard, digest in held if layer == pair.student]
            if [shard for shard, _ in own] != self._index.layout(self.answers, pair.student):
                raise _damaged(path, "its files of states are not those of its examples")
            wide = {"states": [self._index.width]}
            self._states[pair.student] = _Rows(folder, own, rows, wide)

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The layers whose states are here, by student layer; empty: there are no states."""
        return self._index.pairs if self._index else ()

    @property
    def interface(self) -> str | None:
        """Which activation the states are: mlp, attn, block, hidden or span."""
        return self._index.interface if self._index else None

    @property
    def map(self) -> str | None:
        """What carried them over to the student."""
        return self._index.map if self._index else None

    def kernels(self) -> Kernels | None:
        """Of each teacher layer, and the places they are of; ``None``: there are none."""
        if not self._kernels:
            return None
        layers = [file.get_tensor("kernel") for file in self._kernels]
        return Kernels(torch.stack(layers), self._places)

    def of(self, example: int) -> TopLogits:
        """The logits of one example.

        Raises:
            IncompatibleError: there are none: they were written for another tokenizer.

        """
        if not self.top_k:
            raise IncompatibleError(
                "these targets hold no logits: teacher and student have different tokenizers",
                "take --output-loss ce or cosine, or a teacher of the student's tokenizer",
            )
        return TopLogits(*(self._logits.read(example, n) for n in ("logits", "ids", "logsumexp")))

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        """Mapped states (n, D_S) for one student layer, from 1, in the stored type.

        Row i belongs to answer token ``aligned(example)[i]``: it is of the position before it.
        """
        return self._states[student_layer].read(example, "states")

    def aligned(self, example: int) -> torch.Tensor:
        """The answer tokens (n,) int64 of one example that have states, counted from its first."""
        if self._index is None or self._index.aligned is None:
            return torch.arange(self.answers[example])
        return torch.tensor(self._index.aligned[example], dtype=torch.long)


class _Rows:
    """Some tensors whose rows lie, example after example, in several files."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[tuple[Shard, str]],
        rows: Sequence[int],
        columns: Mapping[str, Sequence[int]],
    ) -> None:
        self._rows = rows
        self._places: list[tuple[int, int]] = []  # shard and first row of each example
        self._files: list[Any] = []
        for number, (shard, digest) in enumerate(files):
            wanted = {name: [shard.rows, *rest] for name, rest in columns.items()}
            self._files.append(_opened(folder / shard.file, digest, wanted))
            row = 0
            for count in rows[shard.first : shard.first + shard.examples]:
                self._places.append((number, row))
                row += count

    def read(self, example: int, name: str) -> torch.Tensor:
        number, row = self._places[example]
        found: torch.Tensor = self._files[number].get_slice(name)[row : row + self._rows[example]]
        return found


def _shard(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sha256"}


def _states_of(
    held: dict[str, Any] | None,
) -> tuple[StatesIndex | None, list[tuple[int, Shard, str]]]:
    if held is None:
        return None, []
    aligned = held["aligned"]
    found = StatesIndex(
        interface=str(held["interface"]),
        map=str(held["map"]),
        dtype=str(held["dtype"]),
        width=int(held["width"]),
        pairs=tuple(LayerPair(**pair) for pair in held["pairs"]),
        aligned=None if aligned is None else tuple(tuple(map(int, each)) for each in aligned),
    )
    if found.dtype not in STORED:
        raise ValueError(f"dtype {found.dtype}")
    files = []
    for entry in held["files"]:
        shard = {key: value for key, value in _shard(entry).items() if key != "student"}
        files.append((int(entry["student"]), Shard(**shard), str(entry["sha256"])))
    return found, files


def _kernels_of(
    held: dict[str, Any] | None,
) -> tuple[tuple[tuple[int, int], ...], list[tuple[str, str]]]:
    if held is None:
        return (), []
    places = tuple((int(example), int(token)) for example, token in held["places"])
    return places, [(str(each["file"]), str(each["sha256"])) for each in held["files"]]


def _within(aligned: Sequence[Sequence[int]] | None, answers: Sequence[int]) -> bool:
    pairs = zip(aligned or (), answers, strict=False)
    return all(0 <= token < count for tokens, count in pairs for token in tokens)


def _opened(path: Path, digest: str, wanted: Mapping[str, Sequence[int]]) -> Any:
    try:
        with path.open("rb") as raw:
            found = hashlib.file_digest(raw, "sha256").hexdigest()
        if found != digest:
            raise _damaged(path, f"expected SHA-256 {digest[:12]}…, found {found[:12]}…")
        file: Any = safe_open(str(path), framework="pt")
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if shapes != wanted:
        raise _damaged(path, f"expected shapes {wanted}, found {shapes}")
    return file


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: these targets are damaged: {what}",
        "write them again with pkt align --targets-only --overwrite",
    )
