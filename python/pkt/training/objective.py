"""What training makes small, where it is not the labels' cross-entropy alone.

Logit distillation: the student's distribution at an answer token comes near the teacher's. Known
of the teacher are its k largest logits z_i and the log-sum-exp Z over the whole vocabulary; all
other tokens are one bin:

    p_i = exp(z_i − Z),  p_tail = 1 − Σ p_i;   q likewise of the student, over the same k tokens
    KL(p ‖ q) = Σ p_i log(p_i / q_i) + p_tail log(p_tail / q_tail)

k + 1 bins never say more than the whole vocabulary, so this is at most the full divergence; where k
is the vocabulary it is that. Temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from pkt.records import Sample, TopLogits
from pkt.training.activations import View

ELEMENTS = 1 << 20  # of a distribution over the whole vocabulary, compared at once

Columns = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a whole optimizer step counts, over all its micro-batches and processes."""

    tokens: float  #: answer tokens
    rows: float = 0.0  #: of them, those that the objective has an activation for
    samples: float = 0.0  #: samples with two such tokens or more


@dataclass(frozen=True)
class Said:
    """What the student makes of a micro-batch, at the positions that predict its n answer tokens.

    Rows go sample by sample, and within a sample as the tokens do.
    """

    logits: torch.Tensor  #: (n, V)
    tokens: torch.Tensor  #: (n,), the answer tokens
    columns: Columns  #: what the objective gave the batch
    examples: Sequence[int]  #: which training example each sample is
    totals: Totals
    frontier: int | None = None  #: the student layer that is trained now; None: all are
    activation: Callable[[View], torch.Tensor] | None = None  #: (n, D) float32 of an asked view
    readout: Callable[[torch.Tensor], torch.Tensor] | None = None  #: head(norm(h)), float32


class Objective(Protocol):
    """The loss of a training run."""

    stages: tuple[int, ...]
    """Student layers, from 1, each the frontier for its share of the steps; empty: all at once."""

    reads_out: bool
    """Whether it needs `Said.readout`."""

    def ready(self, model: Any, samples: Sequence[Sample]) -> Objective:
        """Itself, with what it has to measure on the model at step 0; or an `IncompatibleError`."""

    def views(self, frontier: int | None) -> tuple[View, ...]:
        """The student's activations that it needs."""

    def rows(self, example: int) -> int:
        """Answer tokens of a training example that it has an activation for."""

    def columns(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        """What it needs of these training examples beside their tokens, as a batch."""

    def loss(self, said: Said) -> dict[str, torch.Tensor]:
        """A micro-batch's share of the step's loss, by part; their sum is made small."""


def log_bins(rows: Sequence[TopLogits]) -> dict[str, torch.Tensor]:
    """The teacher's rows, one after another: ids (n, k), and log p (n, k + 1), the tail's last."""
    ids = torch.cat([row.ids for row in rows]).long()
    logits = torch.cat([row.logits for row in rows]).double()
    logs = logits - torch.cat([row.logsumexp for row in rows])[:, None]
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(0).log()
    return {"teacher_ids": ids, "teacher_logs": torch.cat([logs, rest], dim=-1).float()}


@dataclass(frozen=True)
class Distillation:
    """``weight`` · KL(teacher ‖ student) + (1 − ``weight``) · cross-entropy of the labels.

    Args:
        targets: the teacher's rows of a training example, one an answer token.
        vocabulary: tokens that both models know; what is beyond is padding and not in the KL.
        weight: of the divergence, above 0 and at most 1.

    """

    targets: Callable[[int], Any]
    vocabulary: int
    weight: float = 1.0
    stages: tuple[int, ...] = ()
    reads_out: bool = False

    def ready(self, model: Any, samples: Sequence[Sample]) -> Distillation:
        """Nothing is measured."""
        return self

    def views(self, frontier: int | None) -> tuple[View, ...]:
        """None: it looks at logits alone."""
        return ()

    def rows(self, example: int) -> int:
        """None."""
        return 0

    def columns(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The teacher's rows of these examples, see `log_bins`."""
        return log_bins([self.targets(example) for example in examples])

    def loss(self, said: Said) -> dict[str, torch.Tensor]:
        """Mean over the answer tokens of the step; computed in float32."""
        logits = said.logits.float()
        total = self.weight * self._divergence(said, logits[:, : self.vocabulary])
        if self.weight < 1:
            labels = functional.cross_entropy(logits, said.tokens, reduction="sum")
            total = total + (1 - self.weight) * labels
        return {"output": total / said.totals.tokens}

    def _divergence(self, said: Said, logits: torch.Tensor) -> torch.Tensor:
        columns = said.columns
        return divergence(logits, columns["teacher_ids"], columns["teacher_logs"])


@dataclass(frozen=True)
class WholeDistillation(Distillation):
    """The same over the whole vocabulary, from logits (n, V) that are made when they are needed.

    ``targets`` gives these float32 of a training example; no batch carries them along.
    """

    def columns(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def _divergence(self, said: Said, logits: torch.Tensor) -> torch.Tensor:
        total, first = logits.new_zeros(()), 0
        step = max(1, ELEMENTS // self.vocabulary)
        for example in said.examples:
            for block in self.targets(example).split(step):
                whole = block.to(logits.device, torch.float64).log_softmax(-1).float()
                ours = logits[first : first + len(whole)].log_softmax(-1)
                terms = whole.exp() * (whole - ours)
                total = total + torch.where(whole.isneginf(), 0.0, terms).sum()
                first += len(whole)
        assert first == len(logits), (first, len(logits))
        return total


def divergence(logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ over rows of KL(teacher ‖ student) over k + 1 bins, in nats; never below 0 but by rounding.

    Args:
        logits: of the student, (n, V).
        ids: tokens of the first k bins, (n, k), distinct.
        teacher: log probabilities of the bins, (n, k + 1), the tail's last; not used where k = V.

    """
    logs = logits.log_softmax(-1)
    ours = logs.gather(-1, ids)
    if ids.shape[1] < logits.shape[1]:
        # Summed over the other tokens: 1 − Σ q_i would lose a small tail, and its gradient.
        rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        ours = torch.cat([ours, rest], dim=-1)
    theirs = teacher[:, : ours.shape[1]]
    terms = theirs.exp() * (theirs - ours)  # a bin that is empty for the teacher adds nothing
    return torch.where(theirs.isneginf(), 0.0, terms).sum()
