"""The teacher's top logits, a file at a time: each finished one is a durable step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pkt.durable import durable
from pkt.methods.targeting.task import Task
from pkt.records import TopLogits
from pkt.sweep import Spool, Sweep, answer_logits
from pkt.targets import Shard, pack, tail, top_logits

Row = tuple[TopLogits, float, float]


class LogitShards:
    """Writes the shards of ``task`` into ``folder``, from the first that is not there on.

    Args:
        task: which examples and how many logits.
        folder: of the shards, which exists.
        spool: keeps a record of each finished shard.

    """

    def __init__(self, task: Task, folder: Path, spool: Spool) -> None:
        self._task, self._folder, self._spool = task, folder, spool
        self.records: list[dict[str, Any]] = []
        for shard in task.shards:
            record = spool.get(_record(shard))
            if record is None or not intact(folder / shard.file, record):
                break
            self.records.append(record)

    @property
    def finished(self) -> bool:
        """Whether every shard is there."""
        return len(self.records) == len(self._task.shards)

    def write(self, sweep: Sweep) -> None:
        """Every shard that is left, from the last boundary in the spool of ``sweep``."""
        shards = self._task.shards
        first = shards[len(self.records)].first
        rows = self._rows(sweep, first)
        for shard in shards[len(self.records) :]:
            parts: list[TopLogits] = []
            loss = outside = 0.0
            for number in range(shard.first, shard.first + shard.examples):
                top, nll, tails = next(rows)
                parts.append(top)
                loss, outside = loss + nll, outside + tails
                sweep.notify("targets", number + 1, len(sweep.seeds))
            data = pack(parts)
            with durable(self._folder / shard.file) as file:
                file.write(data)
            digest = hashlib.sha256(data).hexdigest()
            record = {"sha256": digest, "loss": loss, "tail": outside}
            self._spool.put(_record(shard), record)
            self.records.append(record)

    def digests(self) -> list[str]:
        """The SHA-256 of each file."""
        return [str(record["sha256"]) for record in self.records]

    def means(self) -> dict[str, float]:
        """What the rows say of the teacher, as means over the answer tokens."""
        count = sum(self._task.answers)
        return {
            name: sum(float(record[name]) for record in self.records) / count
            for name in ("loss", "tail")
            if self.records
        }

    def _rows(self, sweep: Sweep, first: int) -> Iterator[Row]:
        """One example after another: its rows, Σ −log p(token), Σ probability of the tail."""
        config = self._task.config
        for _, blocks in groupby(answer_logits(sweep, first), key=lambda block: block[0]):
            parts: list[TopLogits] = []
            nll = tails = 0.0
            for _, tokens, logits in blocks:
                top = top_logits(logits, config.top_k, config.rows)
                said = logits.gather(-1, tokens[:, None])[:, 0].double().cpu()
                nll += float((top.logsumexp - said).sum())
                if config.top_k < config.rows:
                    tails += float(tail(top).sum())
                parts.append(top)
            yield TopLogits(*(torch.cat(column) for column in _columns(parts))), nll, tails


def _columns(parts: list[TopLogits]) -> Iterator[list[torch.Tensor]]:
    for name in ("logits", "ids", "logsumexp"):
        yield [getattr(part, name) for part in parts]


def _record(shard: Shard) -> str:
    return shard.file.removesuffix(".safetensors")


def intact(path: Path, record: dict[str, Any]) -> bool:
    """Whether a file is the one that its record is of."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == str(record["sha256"])
    except OSError:
        return False
