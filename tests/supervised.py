"""A teacher's activations, in memory or in a file, with the methods of `pkt.targets.Targets`.

As a program: `pkt.train` with what the first argument, a JSON object, says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pkt
from pkt.records import LayerPair, SampleSet, TopLogits
from pkt.targets import Targets, top_logits

STATES = "remembered.safetensors"


@dataclass
class Remembered:
    """States by student layer and example, and the whole logits of each example."""

    pairs: tuple[LayerPair, ...]
    answers: Sequence[int]
    held: Mapping[int, Sequence[torch.Tensor]]
    logits: Sequence[torch.Tensor]
    interface: str = "hidden"
    map: str = "dual"
    top_k: int = 7
    kept: Sequence[torch.Tensor] | None = None  #: aligned answer tokens; None: all

    def of(self, example: int) -> TopLogits:
        return top_logits(self.logits[example], self.top_k, self.logits[example].shape[1])

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        return self.held[student_layer][example]

    def aligned(self, example: int) -> torch.Tensor:
        if self.kept is None:
            return torch.arange(self.answers[example])
        return self.kept[example]


def drawn(
    samples: SampleSet, layers: Sequence[int], width: int, vocabulary: int, seed: int = 0,
    **options: object,
) -> Remembered:  # fmt: skip
    """Random states and logits for these samples."""
    draw = torch.Generator().manual_seed(seed)
    answers = [sample.loss_tokens for sample in samples.samples]
    held = {
        layer: [torch.randn(count, width, generator=draw) for count in answers] for layer in layers
    }
    logits = [2 * torch.randn(count, vocabulary, generator=draw) for count in answers]
    pairs = tuple(LayerPair(layer, layer) for layer in layers)
    return Remembered(pairs, answers, held, logits, **options)  # type: ignore[arg-type]


class Beside(Targets):
    """Targets as `pkt align` writes them, and beside their index a file of states."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / STATES
        about = {}
        if path.is_file():
            with safe_open(str(path), framework="pt") as file:
                about = dict(file.metadata())
            self._held = load_file(path)
        self.pairs = tuple(LayerPair(*each) for each in json.loads(about.get("pairs", "[]")))
        self.interface, self.map = about.get("interface"), about.get("map")

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        return self._held[f"{student_layer}.{example}"]

    def aligned(self, example: int) -> torch.Tensor:
        return torch.arange(self.answers[example])


def remember(folder: Path, held: Remembered) -> None:
    """Put the states of ``held`` beside the targets in ``folder``."""
    tensors = {
        f"{layer}.{example}": state.clone()
        for layer, states in held.held.items()
        for example, state in enumerate(states)
    }
    pairs = json.dumps([[pair.teacher, pair.student] for pair in held.pairs])
    about = {"interface": held.interface, "map": held.map, "pairs": pairs}
    save_file(tensors, folder / "targets" / STATES, metadata=about)


def reading() -> Any:
    """Inside, folders of targets have these states."""
    return mock.patch("pkt.targets.Targets", Beside)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with reading():
        pkt.train(*given.pop("paths"), **given)
