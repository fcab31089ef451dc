"""What is done to one layer of a sweep, to the embedding before it and to the head behind.

For a linear layer y = xWᵀ autograd is never asked for a weight gradient: its input X and upstream
gradient dY go to an observer, which makes of dYᵀX what it needs at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pkt.batches import batches
from pkt.checkpoint import Checkpoint, Piece
from pkt.config import LOGIT_ELEMENTS
from pkt.errors import PktError
from pkt.processes import require_all, wait_for_all
from pkt.records import Sample
from pkt.sweep.calls import Calls
from pkt.sweep.capture import Captures
from pkt.sweep.names import TRIED, boundary, record_of, upstream_of
from pkt.sweep.placement import Placement
from pkt.sweep.roles import Notify, Observer, Source, Weights
from pkt.sweep.skeleton import Skeleton
from pkt.sweep.small import ApartError, SmallParameters
from pkt.sweep.spool import Spool
from pkt.sweep.taps import NoTap, Tap

# Never, always, or as long as every seed is given the bits that it is given alone.
Batched = Literal["never", "exact", "always"]
Batch = tuple[int, ...]  # seeds by number
Way = Literal["forward", "backward"]
Shape = tuple[Any, ...]  # way, and lengths of a batch

GATHER_TOKENS = 1024  # embedding rows copied at once


@dataclass
class LayerSteps:
    """One teacher, its seeds, and the work folder they leave their traces in."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    seeds: Sequence[Sample]
    spool: Spool
    source: Source
    device: torch.device
    whole_layer: bool  #: scores of a layer are resident; else (X, dY) are spooled, matrix by matrix
    chunk_rows: int  #: embedding rows that fit a slot
    every: int = 1  #: every k-th layer's inputs are left by the forward pass
    keep_last: bool = False  #: last hidden states are wanted again, for embedding and head
    notify: Notify = lambda phase, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)
    intact: Callable[[Mapping[str, Any]], bool] = lambda record: True  #: its side files are sound
    batched: Batched = "never"  #: whether seeds of like length go through a layer together
    tap: Tap = field(default_factory=NoTap)  #: takes of the forward pass what sub-layers add

    def __post_init__(self) -> None:
        """Read the small parameters outside the layers: every phase needs them."""
        self._records: list[dict[str, Any]] = []
        lengths = [len(seed.tokens) for seed in self.seeds]
        together = batches(lengths)
        # Alone in the same order: sums of scores have it.
        alone = [(number,) for numbers in together for number in numbers]
        self._together = alone if self.batched == "never" else together
        # Ways and shapes of batches that were tried, by this process or by one that was killed:
        # split up since, or as each seed alone. Tangled: small parameters need autograd itself.
        tried = self.spool.get(TRIED) or {"apart": [], "exact": [], "tangled": False}
        self._apart: set[Shape] = {tuple(shape) for shape in tried["apart"]}
        self._exact: set[Shape] = {tuple(shape) for shape in tried["exact"]}
        self._tangled = bool(tried["tangled"])
        self._spoiled = False  # a batch of the layer at work must be split up
        self._remade: Counter[str] = Counter()  # files that this process has found damaged
        self.placement = Placement(self.skeleton, self.checkpoint, self.chunk_rows)
        self.outer = self.source.read(self.placement.outer())
        self.calls = Calls(
            self.skeleton, self.outer, self.spool.width, self.spool.dtype, self.device
        )

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
        depth, at = len(self.skeleton.layers), index + 1
        synced = at % self.every == 0 or at == depth  # the others can be made from these

        def through(numbers: Batch) -> list[torch.Tensor]:
            rows = self._padded(boundary(index), numbers)
            args, kwargs = self.calls.of(rows.shape[1], index)
            length = len(self.seeds[numbers[0]].tokens)
            if index == 0 and length < rows.shape[1] and self.batched == "always":
                self._require_causal(weights, rows, length)
            return [self._apply(index, weights, rows, args, kwargs)]

        def work() -> None:
            with self.spool.writer(boundary(at), synced=synced) as out, self.tap.layer(index):
                for numbers in self._batches("forward"):
                    (result,) = through(numbers)
                    if not self._shared("forward", numbers, [result], through):
                        continue
                    for row, number in enumerate(numbers):
                        seed = self.seeds[number]
                        block = result[row, : len(seed.tokens)]
                        if not bool(torch.isfinite(block).all()):
                            raise self._bad_layer(index, weights, seed, "activation")
                        self.tap.take(number, row)
                        out.write(number, block)

        self._unless_apart(work)

    def _padded(self, name: str, numbers: Batch) -> torch.Tensor:
        """The blocks of some seeds (seeds, rows, D), zeros behind the shorter ones."""
        blocks = [self.spool.read(name, number) for number in numbers]
        return pad_sequence(blocks, batch_first=True).to(self.device)

    def _batches(self, way: Way) -> Iterator[Batch]:
        """The seeds that go through a layer together.

        Raises:
            ApartError: in the end, if some of them could not: the layer is to be begun again.

        """
        self._spoiled = False
        for numbers in self._together:
            apart = self._shape(way, numbers) in self._apart
            apart |= way == "backward" and self._tangled
            yield from ((number,) for number in numbers) if apart else (numbers,)
        if self._spoiled:
            raise ApartError

    def _shape(self, way: Way, numbers: Batch) -> Shape:
        return way, *(len(self.seeds[number].tokens) for number in numbers)

    def _unless_apart(self, work: Callable[[], None]) -> None:
        """Do ``work`` on a layer, again from its beginning if batches had to be split up."""
        while True:
            try:
                return work()
            except ApartError:
                self._keep_tried()

    def _shared(
        self, way: Way, numbers: Batch, found: Sequence[torch.Tensor],
        alone: Callable[[Batch], Sequence[torch.Tensor]],
    ) -> bool:  # fmt: skip
        """Whether seeds that shared a call may do so; if not, their batch is split up henceforth.

        Where batches must change no bit, the first one of each shape is held against its seeds
        alone. Which kernel a product takes hangs on its shape, so the first layer tells for all,
        and of seeds of one length the first, with the last of the batch, tells for the others.
        """
        shape = self._shape(way, numbers)
        if self.batched != "exact" or len(numbers) == 1 or shape in self._exact:
            return True
        lengths = shape[1:]
        for row in {*map(lengths.index, lengths), len(numbers) - 1}:
            pairs = zip(found, alone((numbers[row],)), strict=True)
            if not all(torch.equal(whole[row, : lengths[row]], one[0]) for whole, one in pairs):
                self._split(way, numbers)
                return False
        self._exact.add(shape)
        self._keep_tried()
        return True

    def _split(self, way: Way, numbers: Batch) -> None:
        """Take the seeds of such a batch one by one; where they are so already, by autograd."""
        self._tangled |= len(numbers) == 1
        self._apart.add(self._shape(way, numbers))
        self._spoiled = True

    def _keep_tried(self) -> None:
        """What was tried stays so when another process continues: a rounding may hide at times."""
        tried = {"apart": sorted(self._apart), "exact": sorted(self._exact)}
        self.spool.put(TRIED, {**tried, "tangled": self._tangled})

    def _require_causal(self, weights: Weights, rows: torch.Tensor, length: int) -> None:
        """Refuse a family in which what is behind a text changes its states."""
        whole, alone = (
            self._apply(0, weights, part, *self.calls.of(part.shape[1], 0))[0, :length].float()
            for part in (rows[:1], rows[:1, :length])
        )
        if float((whole - alone).abs().max()) > 0.05 * (1 + float(alone.abs().max())):
            raise self.skeleton.tape.refusal("looks ahead of a position")

    def _head(self, depth: int) -> None:
        """Loss of each seed, and its gradient with respect to the last hidden state."""
        head = self.source.read({"head": self.placement.head})["head"]
        losses = []
        with self.spool.writer(upstream_of(depth)) as out:
            for number, seed in enumerate(self.seeds):
                hidden = self.spool.read(boundary(depth), number).to(self.device)
                if number == 0:
                    self.check_head(hidden, head)
                loss, gradient = self.loss(seed, hidden, head)
                if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
                    pieces = {"head": self.placement.head, **self.placement.outer()}
                    raise self.not_finite(pieces, {"head": head, **self.outer}, seed, "loss")
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

    def _backward(self, index: int, weights: Weights, observer: Observer | None) -> None:
        """Recompute one layer with gradients; hand them to the observer, if there is one.

        Without, the layer has been scored before, and the gradients at its inputs are lacking.
        """
        self._unless_apart(lambda: self._backward_layer(index, weights, observer))
        if observer:
            record = observer.finish_layer(index)
            self.spool.put(record_of(index), record)
            self._records.insert(0, record)
            wait_for_all()  # one that was killed just before may have to begin this layer again
        self.spool.drop(upstream_of(index + 1))

    def _backward_layer(self, index: int, weights: Weights, observer: Observer | None) -> None:
        layer, linears = self.skeleton.layers[index], self.skeleton.linears(index)
        others = {
            name: weights[name]
            for name, _ in layer.named_parameters()
            if observer and name.removesuffix(".weight") not in linears
        }
        sink = observer.linear if observer and self.whole_layer else None
        captures = Captures(linears if observer else {}, self.spool, sink)
        small = SmallParameters(layer, linears) if observer and not self._tangled else None
        if observer:
            observer.begin_layer(index)

        def through(numbers: Batch, wanted: Weights) -> list[torch.Tensor | None]:
            """What the layer puts out, then gradients: of its inputs, and of ``wanted``."""
            hidden = self._padded(boundary(index), numbers)
            upstream = self._padded(upstream_of(index + 1), numbers)
            args, kwargs = self.calls.of(hidden.shape[1], index)
            leaf = hidden.requires_grad_()
            live = {name: weight.detach().requires_grad_() for name, weight in wanted.items()}
            result = self._apply(index, {**weights, **live}, leaf, args, kwargs)
            inputs = [leaf, *live.values()]
            made = torch.autograd.grad(result, inputs, upstream, allow_unused=True)
            return [result.detach(), *made]

        def alone(numbers: Batch) -> list[torch.Tensor]:
            return [each for each in through(numbers, {}) if each is not None]

        with captures, self.spool.writer(upstream_of(index)) as out:
            for numbers in self._batches("backward"):
                lengths = [len(self.seeds[number].tokens) for number in numbers]
                noted = small.batch() if small else nullcontext()
                try:
                    with captures.batch(numbers, weights), noted:
                        result, gradient, *made = through(numbers, {} if small else others)
                    each: list[Mapping[str, torch.Tensor | None]] = (
                        [small.gradients(row, lengths, others) for row in range(len(numbers))]
                        if small
                        else [dict(zip(others, made, strict=True))]
                    )
                except ApartError:
                    self._split("backward", numbers)
                    continue
                assert result is not None
                assert gradient is not None
                if not self._shared("backward", numbers, [result, gradient], alone):
                    continue
                if uncalled := captures.uncalled:
                    raise self.skeleton.tape.refusal(f"does not call {uncalled} once in a layer")
                for row, number in enumerate(numbers):
                    finite = captures.finite[number]
                    if observer:
                        for name, its in each[row].items():
                            if its is not None:
                                finite &= observer.parameter(name, others[name], its)
                    if not finite:
                        raise self._bad_layer(index, weights, self.seeds[number], "gradient")
                    out.write(number, gradient[row, : lengths[row]])
            if observer:
                self._finish_matrices(index, weights, captures, observer)

    def _finish_matrices(
        self, index: int, weights: Weights, captures: Captures, observer: Observer
    ) -> None:
        for module in self.skeleton.linears(index):
            weight = weights[f"{module}.weight"]
            if not self.whole_layer:
                for numbers in self._together:
                    xs, dys = (
                        [each.to(self.device) for each in side]
                        for side in captures.replay(module, numbers)
                    )
                    found = observer.linear(module, weight, xs, dys)
                    for number, finite in zip(numbers, found, strict=True):
                        if not finite:
                            raise self._bad_layer(index, weights, self.seeds[number], "gradient")
            observer.finish_matrix(index, module, weight)

    def _apply(
        self, index: int, weights: Weights, hidden: torch.Tensor, args: Any, kwargs: Any
    ) -> torch.Tensor:
        require_all()
        layer = self.skeleton.layers[index]
        absent = [name for name, _ in layer.named_parameters() if name not in weights]
        if absent:
            raise self.skeleton.tape.refusal(f"has no weight for '{absent[0]}' of layer {index}")
        result = torch.func.functional_call(
            layer, dict(weights), (hidden, *args), kwargs, tie_weights=False
        )
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, torch.Tensor) or result.shape != hidden.shape:
            raise self.skeleton.tape.refusal("has decoder layers that return no hidden state")
        if result.dtype != hidden.dtype:
            raise self.skeleton.tape.refusal(f"turns hidden states into {result.dtype}")
        return result

    @torch.no_grad()
    def check_head(self, hidden: torch.Tensor, head: torch.Tensor) -> None:
        """Refuse a family whose logits at a position depend on other positions."""
        two = self.skeleton.logits(hidden[:2], head, self.outer)[0].float()
        one = self.skeleton.logits(hidden[:1], head, self.outer)[0].float()
        far = float((two - one).abs().max()) > 0.05 * (1 + float(one.abs().max()))
        if far and bool(torch.isfinite(one).all()):
            raise self.skeleton.tape.refusal("mixes positions after its last layer")

    def _bad_layer(self, index: int, weights: Weights, seed: Sample, what: str) -> PktError:
        pieces = self.placement.layer(index)
        return self.not_finite(pieces, weights, seed, f"{what} in layer {index}")

    def not_finite(
        self, pieces: Mapping[str, Piece], weights: Weights, seed: Sample, what: str
    ) -> PktError:
        """The error that blames the weight which is NaN or infinite, else the seed."""
        for name, piece in pieces.items():
            if damage := self.placement.damage(weights[name], piece):
                return damage
        return PktError(
            f"seed {seed.name}: its {what} is not finite, though all weights are",
            "try --dtype float32, or leave this seed out",
        )
