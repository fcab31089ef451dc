"""What a teacher says at each answer token, on the disk, for a student to learn: its top logits.

A folder of targets holds shards of whole rows, one row an answer token in the order of the data,
and ``index.json`` that says which examples are where. Rows are exact: logits in float32 as they
were computed, their log-sum-exp in float64; the tail that is left out is known by its probability.
What only pads a vocabulary (rows beyond the tokenizer's) counts in neither.

=============  ======  ===============  ====================================================
tensor         dtype   shape            content
=============  ======  ===============  ====================================================
``logits``     F32     (rows, k)        the k largest, descending; of equal ones the lower id
``ids``        I32     (rows, k)        their tokens
``logsumexp``  F64     (rows,)          of the whole vocabulary, summed in float64
=============  ======  ===============  ====================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pkt.errors import CheckpointError
from pkt.records import TopLogits

FOLDER = "targets"  # of the shards and their index, in the folder of a run
INDEX = "index.json"
SHARD_BYTES = 64 << 20  # a shard ends with the example that reaches it
BLOCK_ELEMENTS = 1 << 20  # logits ranked and summed at once


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, and the run of examples in it."""

    file: str
    first: int  #: example
    examples: int
    rows: int  #: answer tokens


def row_bytes(top_k: int) -> int:
    """Bytes that one answer token takes."""
    return 8 * top_k + 8


def layout(answers: Sequence[int], top_k: int) -> list[Shard]:
    """The shards of examples with these numbers of answer tokens: by their sizes alone."""
    runs: list[tuple[int, int, int]] = []
    first = rows = 0
    for number, count in enumerate(answers):
        rows += count
        if rows * row_bytes(top_k) >= SHARD_BYTES or number == len(answers) - 1:
            runs.append((first, number + 1 - first, rows))
            first, rows = number + 1, 0
    return [
        Shard(f"logits-{number:05d}-of-{len(runs):05d}.safetensors", *run)
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


def index_text(shards: Sequence[tuple[Shard, str]], answers: Sequence[int], top_k: int) -> str:
    """``index.json``.

    Args:
        shards: with the SHA-256 of each file.
        answers: answer tokens of each example.
        top_k: k.

    """
    files = [{**asdict(shard), "sha256": digest} for shard, digest in shards]
    found = {"format": 1, "top_k": top_k, "logits": files, "answers": list(answers)}
    return json.dumps(found) + "\n"


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
            self.top_k = int(index["top_k"])  #: k
            self.answers = [int(count) for count in index["answers"]]  #: rows of each example
            files = [(Shard(**_shard(entry)), str(entry["sha256"])) for entry in index["logits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"{type(error).__name__} {error}") from error
        self.sha256 = hashlib.sha256(text).hexdigest()  #: of the index, which holds the shards'
        if [shard for shard, _ in files] != layout(self.answers, self.top_k):
            raise _damaged(path, "its shards are not those of its examples")
        self._places: list[tuple[int, int]] = []  # shard and first row of each example
        self._files: list[Any] = []
        for number, (shard, digest) in enumerate(files):
            self._files.append(_opened(folder / shard.file, shard, digest, self.top_k))
            row = 0
            for count in self.answers[shard.first : shard.first + shard.examples]:
                self._places.append((number, row))
                row += count

    def of(self, example: int) -> TopLogits:
        """The rows of one example."""
        number, row = self._places[example]
        rows = slice(row, row + self.answers[example])
        file = self._files[number]
        return TopLogits(*(file.get_slice(n)[rows] for n in ("logits", "ids", "logsumexp")))


def _shard(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sha256"}


def _opened(path: Path, shard: Shard, digest: str, top_k: int) -> Any:
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
    rows = shard.rows
    wanted = {"logits": [rows, top_k], "ids": [rows, top_k], "logsumexp": [rows]}
    if shapes != wanted:
        raise _damaged(path, f"expected shapes {wanted}, found {shapes}")
    return file


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: these targets are damaged: {what}",
        "write them again with pkt align --targets-only --overwrite",
    )
