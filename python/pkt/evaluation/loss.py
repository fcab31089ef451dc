"""Cross-entropy over answer tokens: how well a model predicts the texts it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pkt.errors import DivergenceError
from pkt.evaluation.logits import (
    AnswerLogits,
    batches,
    device_of,
    evaluating,
    parts,
    vocabulary_rows,
)
from pkt.records import Sample

Step = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExampleLoss:
    """What one sample contributes to a mean loss."""

    name: str  #: the sample's, "test.jsonl:12"
    nll_sum: float  #: Σ −log p(token), nats, over its answer tokens
    tokens: int  #: answer tokens


def cross_entropy(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_tokens: int = 4096,
    notify: Step = lambda done, total: None,
) -> list[ExampleLoss]:
    """Negative log-likelihood of each sample's answer tokens, in the samples' order.

    ``nll_j = −Σ_{i: mask_i} log softmax(z_{i−1})[token_i]``; softmax in float32 over the whole
    vocabulary, sums in float64.

    Args:
        model: transformers' …ForCausalLM or a PeftModel; on any device, its mode is left as found.
        samples: token ids and loss masks of `pkt.records.Sample`.
        batch_tokens: most tokens in a batch; changes a result by rounding only.
        notify: told of (samples done, samples in all).

    Raises:
        DivergenceError: a loss is NaN or infinite; names the sample.

    """
    sums = [0.0] * len(samples)
    rows, done = vocabulary_rows(model), 0
    with evaluating(model):
        for batch in batches(samples, batch_tokens, device_of(model)):
            logits = AnswerLogits(model, batch)
            total = torch.zeros(len(batch.indices), dtype=torch.float64)
            for part in parts(len(batch.target), rows):
                nll = F.cross_entropy(logits[part], batch.target[part], reduction="none")
                total.index_add_(0, batch.row[part].cpu(), nll.double().cpu())
            for index, value in zip(batch.indices, total.tolist(), strict=True):
                if not math.isfinite(value):
                    raise DivergenceError(
                        f"{samples[index].name}: its loss is {value}",
                        "check the weights; float16 overflows where --dtype float32 does not",
                    )
                sums[index] = value
            done += len(batch.indices)
            notify(done, len(samples))
    return [
        ExampleLoss(sample.name, nll, sample.loss_tokens)
        for sample, nll in zip(samples, sums, strict=True)
    ]


def mean_loss(losses: Sequence[ExampleLoss]) -> tuple[float, float]:
    """Mean nats an answer token, and its standard error over examples.

    ``m = Σ nll_j / Σ n_j``. Tokens of one text are not independent: the error is that of a ratio
    over N whole examples, ``√(N / (N − 1) · Σ (nll_j − m n_j)²) / Σ n_j``; NaN for one example.
    """
    return ratio_mean([loss.nll_sum for loss in losses], [loss.tokens for loss in losses])


def ratio_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """``Σ sums / Σ counts`` and its standard error over examples; see `mean_loss`."""
    total = sum(counts)
    if not total:
        return math.nan, math.nan
    mean, number = math.fsum(sums) / total, len(sums)
    if number < 2:
        return mean, math.nan
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(number / (number - 1) * squares) / total
