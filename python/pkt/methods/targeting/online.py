"""Targets that are made when they are asked for, by a teacher that stays in memory.

`LiveTargets` reads as `pkt.targets.Targets` does. Nothing is lost by it and nothing gained: states
are mapped by the same M and rounded to the same type, of the logits the same k are kept. An example
whose text shared a batch with others in the pass that writes targets was computed in products of
more rows there; the two then differ as two orders of a sum do, everything else is bit-equal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pkt.methods.targeting.places import first_places, of_teacher
from pkt.methods.targeting.task import SUB_LAYERS, Carry, Task
from pkt.pairing import all_sources
from pkt.records import LayerPair, TopLogits
from pkt.similarity import LEAST_STATES, kernel
from pkt.sweep import ResidentSweep
from pkt.targets import (
    KERNEL_EXAMPLES,
    KERNEL_PLACES,
    STORED,
    Kernels,
    stored_states,
    top_logits,
)

KEPT_BYTES = 128 << 20  # of examples that have passed; never less than one example's


@dataclass
class _Passed:
    """What is left of an example that went through the teacher."""

    states: dict[int, torch.Tensor] = field(default_factory=dict)  #: by student layer
    last: torch.Tensor | None = None  #: of the last boundary, until logits are made of it
    top: TopLogits | None = None

    @property
    def bytes(self) -> int:
        top = (self.top.logits, self.top.ids, self.top.logsumexp) if self.top else ()
        last = () if self.last is None else (self.last,)
        return sum(tensor.nbytes for tensor in (*self.states.values(), *last, *top))


class LiveTargets:
    """The targets of a task, with the methods of `pkt.targets.Targets`.

    One pass serves the logits and all states of an example; examples that passed last are kept, so
    many as `KEPT_BYTES` hold. What an example is given does not depend on it.

    Args:
        task: opened inputs and options.
        sweep: of its texts, whose weights are held.
        pairs: of layers; empty: there are no states.
        carry: M (D_S, D_T) float32 of a student layer; ``None`` without pairs.
        logits: whether they are asked for; else a pass ends where the last state is.

    """

    def __init__(
        self,
        task: Task,
        sweep: ResidentSweep,
        pairs: Sequence[LayerPair],
        carry: Carry | None,
        *,
        logits: bool,
    ) -> None:
        self.top_k = task.config.top_k  #: k; 0: there are no logits
        self.answers: Sequence[int] = task.answers  #: tokens of each example
        self.pairs = tuple(pairs)  #: the layers that have states, by student layer
        self.interface = task.states.interface if task.states else None
        self.map = task.states.map if task.states else None
        self._task, self._sweep, self._logits = task, sweep, logits and task.config.top_k > 0
        self._matrices: dict[int, torch.Tensor] = {}
        if carry and task.states:
            shared = None if task.states.fitted_on else carry(0).to(sweep.device).T
            for pair in self.pairs:
                own = carry(pair.student).to(sweep.device).T if shared is None else shared
                self._matrices[pair.student] = own
        self._terms: dict[int, dict[int, float]] = {}
        if task.states and task.student:
            depths = task.teacher.layers, task.student.layers
            terms = all_sources(self.pairs, task.states.interface, *depths)
            numbers = [pair.student for pair in self.pairs]
            self._terms = dict(zip(numbers, terms, strict=True))
        self._kept: OrderedDict[int, _Passed] = OrderedDict()

    def of(self, example: int) -> TopLogits:
        """The logits of one example: the k largest, and their log-sum-exp."""
        passed = self._passed(example)
        if passed.top is None:
            config = self._task.config
            blocks = [
                top_logits(block, config.top_k, config.rows)
                for block in self._blocks(example, passed)
            ]
            columns = ([getattr(b, n) for b in blocks] for n in ("logits", "ids", "logsumexp"))
            passed.top = TopLogits(*(torch.cat(column) for column in columns))
            passed.last = None
        return passed.top

    def whole(self, example: int) -> torch.Tensor:
        """All its logits (n, V) float32, without rows that only pad a vocabulary."""
        blocks = self._blocks(example, self._passed(example))
        return torch.cat([block[:, : self._task.config.rows] for block in blocks])

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        """Mapped states (n, D_S) for one student layer, from 1, in the type that files have.

        Row i belongs to answer token ``aligned(example)[i]``: it is of the position before it.

        Raises:
            PktError: one is too large for the type.

        """
        return self._passed(example).states[student_layer]

    def aligned(self, example: int) -> torch.Tensor:
        """The answer tokens (n,) int64 of one example that have states, counted from its first."""
        if self._task.aligned is None:
            return torch.arange(self.answers[example])
        return torch.tensor(self._task.aligned.tokens[example], dtype=torch.long)

    def kernels(self) -> Kernels | None:
        """Of each teacher layer at the places that files would have them of."""
        places = first_places(self._task, KERNEL_EXAMPLES, KERNEL_PLACES)
        read, layers = of_teacher(self._task, places), range(1, self._task.teacher.layers + 1)
        if len(places) < LEAST_STATES or not self.pairs:
            return None
        parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        for number, positions in zip(read.numbers, read.positions, strict=True):
            found, _ = self._sweep.states(number, positions, layers)
            for layer, held in parts.items():
                held.append(found[layer])
        made = [kernel(torch.cat(held)).float().cpu() for held in parts.values()]
        return Kernels(torch.stack(made), tuple((place.example, place.token) for place in places))

    def close(self) -> None:
        """Give the teacher's memory back; nothing is asked for any more."""
        self._kept.clear()
        self._sweep.release()

    def _passed(self, example: int) -> _Passed:
        if example not in self._kept:
            self._kept[example] = self._pass(example)
            size = sum(passed.bytes for passed in self._kept.values())
            while size > KEPT_BYTES and len(self._kept) > 1:
                size -= self._kept.popitem(last=False)[1].bytes
        self._kept.move_to_end(example)
        return self._kept[example]

    def _pass(self, example: int) -> _Passed:
        """One example through the teacher, and its states mapped."""
        text, passed = self._task.text_of(example), _Passed()
        found: dict[int, torch.Tensor] = {}
        wanted = {source for terms in self._terms.values() for source in terms}
        if text is not None and (wanted or self._logits):
            which: Any = self.interface if self.interface in SUB_LAYERS else None
            found, passed.last = self._sweep.states(
                text, self._task.positions[text], wanted, which, last=self._logits
            )
        for layer, terms in self._terms.items():
            passed.states[layer] = self._mapped(self._matrices[layer], terms, found)
        return passed

    def _mapped(
        self, matrix: torch.Tensor, terms: dict[int, float], found: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """``M a``, in float32, then rounded."""
        assert self._task.states
        dtype = self._task.states.dtype
        if not found:
            return torch.empty(0, matrix.shape[1], dtype=STORED[dtype])
        state: torch.Tensor | None = None
        for source, factor in terms.items():
            rows = factor * found[source].float()
            state = rows if state is None else state + rows
        assert state is not None
        with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
            return stored_states((state @ matrix).cpu(), dtype)[0]

    def _blocks(self, example: int, passed: _Passed) -> Iterator[torch.Tensor]:
        text = self._task.text_of(example)
        assert passed.last is not None, "logits are asked for"
        assert text is not None
        return self._sweep.logits(text, passed.last)
