"""Cross-entropy of a model on samples, in nats over the tokens that count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pkt.records import Sample

CHUNK_LOGITS = 1 << 24  # logits whose log-softmax is made at once, in float32: 64 MiB


@dataclass(frozen=True, slots=True)
class ExampleLoss:
    """The loss of one sample."""

    name: str
    nll_sum: float  #: Σ −log p(token), nats
    tokens: int  #: that count

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nll_sum / self.tokens


@torch.no_grad()
def cross_entropy(
    model: Any, samples: Sequence[Sample], *, batch_tokens: int = 4096
) -> list[ExampleLoss]:
    """The loss of each sample: Σ −log p over its tokens in the loss.

    Log-softmax in float32, sums in float64. Samples of similar length share a batch; the model's
    mode is left as it was.

    Args:
        model: causal language model, on its device.
        samples: to measure.
        batch_tokens: most tokens of a batch, padding counted (a longer sample is one alone).

    """
    training = model.training
    model.eval()
    found: dict[int, ExampleLoss] = {}
    for batch in batches(samples, batch_tokens):
        ids, attention, counts = padded([samples[index] for index in batch], model.device)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        for row, index in enumerate(batch):
            wanted = counts[row, 1:]
            nll = token_losses(logits[row, :-1][wanted], ids[row, 1:][wanted])
            sample = samples[index]
            found[index] = ExampleLoss(sample.name, float(nll.sum()), sample.loss_tokens)
    model.train(training)
    return [found[index] for index in range(len(samples))]


def mean_loss(losses: Sequence[ExampleLoss]) -> tuple[float, float]:
    """Mean loss a token, Σ nll / Σ tokens, and its standard error over examples.

    A ratio of two sums over n examples: √(n/(n−1) · Σ(nll_i − m·t_i)²) / Σt; NaN for one example.
    """
    tokens = sum(loss.tokens for loss in losses)
    mean = math.fsum(loss.nll_sum for loss in losses) / tokens
    count = len(losses)
    if count < 2:
        return mean, math.nan
    spread = math.fsum((loss.nll_sum - mean * loss.tokens) ** 2 for loss in losses)
    return mean, math.sqrt(count / (count - 1) * spread) / tokens


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log p of each target, float64 (n,), from logits (n, V) by chunks of positions."""
    step = max(1, CHUNK_LOGITS // logits.shape[-1])
    parts = [
        F.cross_entropy(logits[i : i + step].float(), targets[i : i + step], reduction="none")
        for i in range(0, len(targets), step)
    ]
    return torch.cat(parts).double()


def batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of samples that share a batch, longest first: what does not fit fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens)):
        longest = len(samples[batch[0]].tokens) if batch else 0
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(
    samples: Sequence[Sample], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and which tokens count, each (samples, longest)."""
    longest = max(len(sample.tokens) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attention, counts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        ids[row, :size], attention[row, :size] = torch.tensor(sample.tokens), 1
        counts[row, :size] = torch.tensor(sample.loss_mask)
    return ids.to(device), attention.to(device), counts.to(device)
