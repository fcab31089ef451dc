"""How alike the layers of teacher and student are, by linear CKA at the places of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from pkt.records import Sample
from pkt.similarity import kernel
from pkt.training import View, watching


@torch.no_grad()
def student_kernels(
    model: Any, layers: int, samples: Sequence[Sample], places: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The kernel of each layer's hidden states, (L_S, n, n) float64.

    Args:
        model: a transformers causal model, wrapped by PEFT or not.
        layers: L_S.
        samples: the training examples.
        places: example, and which of its answer tokens; states are of the position before it.

    """
    views = [View(layer, "hidden") for layer in range(1, layers + 1)]
    states: list[list[torch.Tensor]] = [[] for _ in views]
    training = model.training
    model.eval()
    for example, group in groupby(places, key=lambda place: place[0]):
        sample = samples[example]
        answers = [at for at, counts in enumerate(sample.loss_mask) if counts]
        counted = torch.zeros(1, len(sample.tokens), dtype=torch.bool, device=model.device)
        counted[0, [answers[token] - 1 for _, token in group]] = True
        ids = torch.tensor([sample.tokens], device=model.device)
        with watching(model, views) as seen:
            model(input_ids=ids, use_cache=False)
        for held, view in zip(states, views, strict=True):
            held.append(seen.of(view, counted).cpu())
    model.train(training)
    return torch.stack([kernel(torch.cat(held)) for held in states])
