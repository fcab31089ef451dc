"""Training examples as the batches that a model is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pkt.records import Sample
from pkt.training.objective import Objective

Example = tuple[int, Sample]

COLUMNS = "columns"  # of a batch: what the objective needs beside its tokens, and
EXAMPLES = "examples"  # which training examples it is made of
IGNORED = -100  # the label of a token that does not count, torch's and transformers' convention


class Examples(torch.utils.data.Dataset[Example]):
    """Training examples, each with its number."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        return index, self._samples[index]


class Collate:
    """A batch of examples, with what the objective needs of them."""

    def __init__(self, objective: Objective | None) -> None:
        self._objective = objective

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Tokens, mask and labels, padded; and `COLUMNS`, if there is an objective."""
        batch: dict[str, Any] = {**_pad([sample for _, sample in examples])}
        if self._objective:
            numbers = [number for number, _ in examples]
            batch[COLUMNS] = {
                **self._objective.columns(numbers), EXAMPLES: torch.tensor(numbers)
            }  # fmt: skip
        return batch


def _pad(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """A batch (samples, longest): token ids, what is text, and labels of what counts."""
    longest = max(len(sample.tokens) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        tokens, size = torch.tensor(sample.tokens), len(sample.tokens)
        ids[row, :size], attention[row, :size] = tokens, 1
        labels[row, :size] = tokens.where(torch.tensor(sample.loss_mask), IGNORED)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}
