"""Does a student behave like its teacher? Distance of their next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pkt.errors import IncompatibleError, PktError
from pkt.evaluation.logits import (
    AnswerLogits,
    batches,
    device_of,
    evaluating,
    parts,
    vocabulary_rows,
)
from pkt.evaluation.loss import Step, ratio_mean
from pkt.records import Sample


@dataclass(frozen=True, slots=True)
class ExampleAgreement:
    """How a model and its teacher agree on one sample."""

    name: str  #: the sample's
    kl_sum: float  #: Σ KL(p_T‖p), nats, over its answer tokens
    same_top: int  #: answer tokens at which both have the same most probable token
    tokens: int  #: answer tokens


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over answer tokens, and their standard errors over examples (`ratio_mean`)."""

    kl: float
    kl_error: float
    top1: float
    top1_error: float


def agreement(
    model: nn.Module,
    teacher: nn.Module,
    samples: Sequence[Sample],
    *,
    rows: int | None = None,
    batch_tokens: int = 4096,
    notify: Step = lambda done, total: None,
) -> list[ExampleAgreement]:
    """KL divergence from the teacher's distribution and equal arg-maxima, sample by sample.

    ``KL(p_T‖p) = Σ_v p_T(v) (log p_T(v) − log p(v))`` at each answer token; log-softmax in
    float32 over the first ``rows`` logits of both, sums in float64. Ties of the largest logit
    go to the lowest token id.

    Args:
        model: transformers' …ForCausalLM or a PeftModel; its mode is left as found.
        teacher: of the same vocabulary, on the same device.
        samples: token ids and loss masks.
        rows: the tokenizer's length: rows that only pad a vocabulary are left out of both
            softmaxes. At most, and by default, the smaller of both vocabularies.
        batch_tokens: most tokens in a batch, padding included.
        notify: told of (samples done, samples in all).

    Raises:
        IncompatibleError: the answer of a sample holds a token that is not among these rows.
        PktError: a divergence is NaN or infinite; names the sample.

    """
    smaller = min(vocabulary_rows(model), vocabulary_rows(teacher))
    rows = min(rows or smaller, smaller)
    _check_targets(samples, rows)
    sums, same, done = [0.0] * len(samples), [0] * len(samples), 0
    with evaluating(model, teacher):
        for batch in batches(samples, batch_tokens, device_of(model)):
            ours, theirs = AnswerLogits(model, batch), AnswerLogits(teacher, batch)
            kl = torch.zeros(len(batch.indices), dtype=torch.float64)
            equal = torch.zeros(len(batch.indices), dtype=torch.long)
            for part in parts(len(batch.target), rows):
                p, t = ours[part][:, :rows], theirs[part][:, :rows]
                row = batch.row[part].cpu()
                equal.index_add_(0, row, (p.argmax(-1) == t.argmax(-1)).long().cpu())
                p, t = p.log_softmax(-1), t.log_softmax(-1)
                # A probability of exactly zero adds nothing, even where the other's log is −∞.
                terms = torch.where(t.isneginf(), 0, t.exp() * (t - p))
                kl.index_add_(0, row, terms.sum(-1, dtype=torch.float64).cpu())
            for index, value, count in zip(batch.indices, kl.tolist(), equal.tolist(), strict=True):
                if not math.isfinite(value):
                    raise PktError(f"{samples[index].name}: KL(teacher‖model) is {value}")
                sums[index], same[index] = value, count
            done += len(batch.indices)
            notify(done, len(samples))
    return [
        ExampleAgreement(sample.name, kl_sum, top, sample.loss_tokens)
        for sample, kl_sum, top in zip(samples, sums, same, strict=True)
    ]


def mean_agreement(found: Sequence[ExampleAgreement]) -> Agreement:
    """Token-weighted means of `agreement`'s rows."""
    tokens = [row.tokens for row in found]
    return Agreement(
        *ratio_mean([row.kl_sum for row in found], tokens),
        *ratio_mean([row.same_top for row in found], tokens),
    )


def _check_targets(samples: Sequence[Sample], rows: int) -> None:
    for sample in samples:
        if sample.tokens and max(sample.tokens) >= rows:
            raise IncompatibleError(
                f"{sample.name}: token {max(sample.tokens)} is not among the {rows} tokens that "
                "both models know",
                "agreement needs a teacher and a student of one vocabulary",
            )
