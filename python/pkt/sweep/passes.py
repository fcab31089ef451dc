"""The layer-major sweep: every seed goes through layer i before any seed meets layer i + 1.

So the teacher is read at most twice, whatever the number of seeds: once forward, leaving each
layer's inputs in the spool, once backward, where each layer is recomputed with gradients. For a
linear layer y = xWᵀ autograd is never asked for a weight gradient: its input X and upstream
gradient dY go to an observer, which makes dYᵀX in row blocks as it needs them. Results do not
depend on slots, memory budget or on where a killed run was continued. Of several processes each
sweeps seeds of its own; they meet where a layer's scores are summed, and go on from the last layer
that all of them have finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional

from pkt.checkpoint import Checkpoint, Piece
from pkt.errors import PktError
from pkt.host import release_free_memory
from pkt.processes import everywhere, largest, wait_for_all
from pkt.records import Sample
from pkt.sweep.calls import Calls
from pkt.sweep.capture import Captures
from pkt.sweep.ends import Accumulate, column_scores
from pkt.sweep.placement import Placement
from pkt.sweep.skeleton import Skeleton
from pkt.sweep.spool import Spool

LOGIT_ELEMENTS = 1 << 23  # logits made at once; a constant, so that no result depends on a budget
GATHER_TOKENS = 1024  # embedding rows copied at once

Weights = Mapping[str, torch.Tensor]
Notify = Callable[[str, int, int], None]


class Observer(Protocol):
    """What becomes of the gradients, one sample at a time."""

    def linear(self, module: str, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> bool:
        """One seed's input (n, in) and upstream gradient (n, out); false if not finite."""

    def parameter(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> bool:
        """One seed's gradient of any other parameter; false if not finite."""

    def finish_matrix(self, layer: int, module: str, weight: torch.Tensor) -> None:
        """Every seed's part of this linear weight has been seen."""

    def finish_layer(self, layer: int) -> dict[str, Any]:
        """Every parameter of the layer is finished: its JSON record."""


class Source(Protocol):
    """Where weights come from: the stream of jobs, and reads out of turn."""

    def jobs(self, labels: Sequence[tuple[str, dict[str, Piece]]]) -> Iterator[Weights]:
        """The weights of each job in order, valid until the next is asked for."""

    def read(self, pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        """Some tensors now, in memory of their own."""


@dataclass
class Sweep:
    """One teacher, its seeds, and the work folder they leave their traces in."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    seeds: Sequence[Sample]
    spool: Spool
    source: Source
    device: torch.device
    whole_layer: bool  #: scores of a layer are resident; else (X, dY) are spooled, matrix by matrix
    chunk_rows: int  #: embedding rows that fit a slot
    keep_last: bool = False  #: last hidden states are wanted again, for embedding and head
    notify: Notify = lambda phase, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)
    intact: Callable[[Mapping[str, Any]], bool] = lambda record: True  #: its side files are sound

    def __post_init__(self) -> None:
        """Read the small parameters outside the layers: every phase needs them."""
        self.placement = Placement(self.skeleton, self.checkpoint, self.chunk_rows)
        self.outer = self.source.read(self.placement.outer())
        self.calls = Calls(
            self.skeleton, self.outer, self.spool.width, self.spool.dtype, self.device
        )

    def run(self, observer: Observer) -> tuple[list[float], list[dict[str, Any]]]:
        """Both passes, from wherever the spool stands.

        Returns:
            the loss of each seed, and the observer's record of each layer.

        Raises:
            CheckpointError: a weight is NaN or infinite.
            PktError: a seed's loss or gradient is.
            OutputError: the work folder cannot be written.

        """
        depth = len(self.skeleton.layers)
        self._agree(depth)
        records = self._recorded(depth)
        first_done = depth - len(records)
        ends_wanted = self.keep_last and self.spool.get("ends") is None
        head_done = self.spool.get("losses") is not None and (
            self.spool.valid(upstream_of(first_done)) or (first_done == 0 and not ends_wanted)
        )
        if not everywhere(head_done):
            records, first_done = [], depth
            head_done = head_done and self.spool.valid(upstream_of(depth))
        needed = [*range(first_done), *([depth] if ends_wanted or not head_done else [])]
        absent = self._absent(needed)
        embed = 0 in absent
        forward = [index - 1 for index in absent if index > 0]
        backward = list(reversed(range(first_done)))
        jobs: list[tuple[str, dict[str, Piece]]] = []
        chunks = self.placement.embedding_chunks() if embed else []
        jobs += [("embedding", {"rows": piece}) for piece in chunks]
        jobs += [(f"layer {i}", self.placement.layer(i)) for i in (*forward, *backward)]
        weights = self.source.jobs(jobs)
        if embed:
            with self._phase("embed"):
                self._embed(weights, chunks)
        with self._phase("forward"):
            for done, index in enumerate(forward):
                self._forward(index, next(weights))
                release_free_memory()
                self.notify("forward", done + 1, len(forward))
        if not head_done:
            with self._phase("head"):
                self._head(depth)
        with self._phase("backward"):
            for done, index in enumerate(backward):
                records.insert(0, self._backward(index, next(weights), observer))
                release_free_memory()
                self.notify("backward", depth - first_done + done + 1, depth)
        return list(self.spool.get("losses") or []), records

    def ends(self, accumulate: Accumulate) -> dict[str, list[float]]:
        """Column scores (D,) of embedding and head, from the spool that `run` has left."""
        record: dict[str, list[float]] | None = self.spool.get("ends")
        if record is None:
            with self._phase("ends"):
                record = column_scores(self, accumulate)
            self.spool.put("ends", record)
        return record

    def _absent(self, needed: Sequence[int]) -> list[int]:
        """Boundaries that must be made, ascending: each is made from the one before it."""
        absent: set[int] = set()
        for last in needed:
            for index in range(last, -1, -1):
                if index in absent or self.spool.valid(boundary(index)):
                    break
                absent.add(index)
        return sorted(absent)

    def _agree(self, depth: int) -> None:
        """Several processes go on together: records that others of them lack are removed."""
        ours = len(self._recorded(depth))
        common = depth - largest(depth - ours)
        for index in range(depth - ours, depth - common):
            self.spool.forget(_record(index))

    def _recorded(self, depth: int) -> list[dict[str, Any]]:
        """Records of the layers that are done: an unbroken run down from the last layer."""
        records: list[dict[str, Any]] = []
        for index in reversed(range(depth)):
            record = self.spool.get(_record(index))
            if record is None or not self.intact(record):
                break
            records.insert(0, record)
        return records

    def _embed(self, weights: Iterator[Weights], chunks: Sequence[Piece]) -> None:
        """Gather embedding rows, run what the model does before its first layer."""
        tables = (next(weights)["rows"] for _ in chunks)
        with self.gathered(tables) as rows, self.spool.writer(boundary(0)) as out, torch.no_grad():
            for block in rows.split(list(self.spool.lengths)):
                out.append(self.skeleton.prefix(block.to(self.device), self.outer)[0])
        self.calls.require_same(self.skeleton.tape.calls, len(self.seeds[-1].tokens))

    @contextmanager
    def gathered(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The embedding row of every token of every seed, (tokens, D), from runs of rows."""
        ids = torch.tensor([token for seed in self.seeds for token in seed.tokens])
        with self.spool.scratch("rows", len(ids), self.spool.width) as rows:
            start = 0
            for chunk in chunks:
                table, stop = chunk.cpu(), start + chunk.shape[0]
                for part in torch.arange(len(ids)).split(GATHER_TOKENS):
                    here = part[(ids[part] >= start) & (ids[part] < stop)]
                    rows[here] = table[ids[here] - start]
                    if not bool(rows[here].isfinite().all()) and (
                        damage := self.placement.damage(table, self.placement.embedding, start)
                    ):
                        raise damage
                start = stop
            yield rows

    @torch.no_grad()
    def _forward(self, index: int, weights: Weights) -> None:
        with self.spool.writer(boundary(index + 1)) as out:
            for number, seed in enumerate(self.seeds):
                hidden = self.spool.read(boundary(index), number).to(self.device)
                args, kwargs = self.calls.of(len(seed.tokens), index)
                result = self._apply(index, weights, hidden, args, kwargs)
                if not bool(torch.isfinite(result).all()):
                    raise self._bad_layer(index, weights, seed, "activation")
                out.append(result[0])

    def _head(self, depth: int) -> None:
        """Loss of each seed, and its gradient with respect to the last hidden state."""
        head = self.source.read({"head": self.placement.head})["head"]
        losses = []
        with self.spool.writer(upstream_of(depth)) as out:
            for number, seed in enumerate(self.seeds):
                hidden = self.spool.read(boundary(depth), number).to(self.device)
                if number == 0:
                    self._check_head(hidden, head)
                loss, gradient = self.loss(seed, hidden, head)
                if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
                    pieces = {"head": self.placement.head, **self.placement.outer()}
                    raise self._not_finite(pieces, {"head": head, **self.outer}, seed, "loss")
                out.append(gradient)
                losses.append(loss)
                self.notify("head", number + 1, len(self.seeds))
        self.spool.put("losses", losses)

    def loss(
        self, seed: Sample, hidden: torch.Tensor, head: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        """Mean cross-entropy of a seed's loss tokens, and its gradient at ``hidden`` (n, D)."""
        step = max(1, LOGIT_ELEMENTS // head.shape[0])
        gradient, loss = torch.zeros_like(hidden), 0.0
        at = torch.tensor(seed.loss_mask, device=self.device).nonzero()[:, 0]
        targets = torch.tensor(seed.tokens, device=self.device)
        for part in at.split(step):
            leaf = hidden[part - 1].requires_grad_()
            logits = self.skeleton.logits(leaf, head, self.outer).float()
            total = functional.cross_entropy(logits, targets[part], reduction="sum") / len(at)
            (gradient[part - 1],) = torch.autograd.grad(total, leaf)
            loss += float(total.detach())
        return loss, gradient

    def _backward(self, index: int, weights: Weights, observer: Observer) -> dict[str, Any]:
        """Recompute one layer per seed with gradients; hand them to the observer."""
        linears = self.skeleton.linears(index)
        others = {
            name: weights[name]
            for name, _ in self.skeleton.layers[index].named_parameters()
            if name.removesuffix(".weight") not in linears
        }
        captures = Captures(linears, self.spool, observer.linear if self.whole_layer else None)
        live = {**weights, **{n: w.detach().requires_grad_() for n, w in others.items()}}
        with captures, self.spool.writer(upstream_of(index)) as out:
            for number, seed in enumerate(self.seeds):
                hidden = self.spool.read(boundary(index), number).to(self.device)
                upstream = self.spool.read(upstream_of(index + 1), number).to(self.device)
                args, kwargs = self.calls.of(len(seed.tokens), index)
                leaf = hidden.requires_grad_()
                with captures.seed(number, weights):
                    result = self._apply(index, live, leaf, args, kwargs)
                    wanted = [leaf, *(live[name] for name in others)]
                    gradients = torch.autograd.grad(
                        result, wanted, upstream[None], allow_unused=True
                    )
                if uncalled := captures.uncalled:
                    raise self.skeleton.tape.refusal(f"does not call {uncalled} once in a layer")
                finite = captures.finite
                for name, gradient in zip(others, gradients[1:], strict=True):
                    if gradient is not None:
                        finite &= observer.parameter(name, others[name], gradient)
                if not finite:
                    raise self._bad_layer(index, weights, seed, "gradient")
                out.append(gradients[0])
            for module in linears:
                weight = weights[f"{module}.weight"]
                if not self.whole_layer:
                    for seed, (x, dy) in zip(self.seeds, captures.replay(module), strict=True):
                        inputs, upstream = x.to(self.device), dy.to(self.device)
                        if not observer.linear(module, weight, inputs, upstream):
                            raise self._bad_layer(index, weights, seed, "gradient")
                observer.finish_matrix(index, module, weight)
        record = observer.finish_layer(index)
        self.spool.put(_record(index), record)
        wait_for_all()  # one that was killed just before may have to begin this layer again
        self.spool.drop(upstream_of(index + 1))
        if not (self.keep_last and index + 1 == len(self.skeleton.layers)):
            self.spool.drop(boundary(index + 1))
        return record

    def _apply(
        self, index: int, weights: Weights, hidden: torch.Tensor, args: Any, kwargs: Any
    ) -> torch.Tensor:
        layer = self.skeleton.layers[index]
        absent = [name for name, _ in layer.named_parameters() if name not in weights]
        if absent:
            raise self.skeleton.tape.refusal(f"has no weight for '{absent[0]}' of layer {index}")
        result = torch.func.functional_call(
            layer, dict(weights), (hidden[None], *args), kwargs, tie_weights=False
        )
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, torch.Tensor) or result.shape != (1, *hidden.shape):
            raise self.skeleton.tape.refusal("has decoder layers that return no hidden state")
        if result.dtype != hidden.dtype:
            raise self.skeleton.tape.refusal(f"turns hidden states into {result.dtype}")
        return result

    @torch.no_grad()
    def _check_head(self, hidden: torch.Tensor, head: torch.Tensor) -> None:
        """Refuse a family whose logits at a position depend on other positions."""
        two = self.skeleton.logits(hidden[:2], head, self.outer)[0].float()
        one = self.skeleton.logits(hidden[:1], head, self.outer)[0].float()
        far = float((two - one).abs().max()) > 0.05 * (1 + float(one.abs().max()))
        if far and bool(torch.isfinite(one).all()):
            raise self.skeleton.tape.refusal("mixes positions after its last layer")

    def _bad_layer(self, index: int, weights: Weights, seed: Sample, what: str) -> PktError:
        pieces = self.placement.layer(index)
        return self._not_finite(pieces, weights, seed, f"{what} in layer {index}")

    def _not_finite(
        self, pieces: Mapping[str, Piece], weights: Weights, seed: Sample, what: str
    ) -> PktError:
        """Blame the weight that is NaN or infinite, else the seed."""
        for name, piece in pieces.items():
            if damage := self.placement.damage(weights[name], piece):
                return damage
        return PktError(
            f"seed {seed.name}: its {what} is not finite, though all weights are",
            "try --dtype float32, or leave this seed out",
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def boundary(index: int) -> str:
    """Name of the spool file with the inputs of layer ``index``; the last one's are outputs."""
    return f"input-{index:05d}"


def upstream_of(index: int) -> str:
    """Name of the spool file with the gradients at the inputs of layer ``index``."""
    return f"upstream-{index:05d}"


def _record(index: int) -> str:
    return f"layer-{index:05d}"
