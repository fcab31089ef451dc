"""What a recording of targets is asked to do: its options, and its opened inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.models import Model
from pkt.records import LayerPair, Plan, Sample, SampleSet, SharedTokens
from pkt.semantics import MAPS
from pkt.targets import Shard, layout

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
Carry = Callable[[int], torch.Tensor]
"""M (D_S, D_T) float32 of a student layer."""
SUB_LAYERS = ("mlp", "attn")  # interfaces that are what a part of a layer adds


@dataclass(frozen=True, slots=True)
class Config:
    """The options that change the targets."""

    top_k: int = 64  #: logits an answer token, at most ``rows``; 0: none are kept
    rows: int = 0  #: tokens of the vocabulary that teacher and student share
    dtype: str = "BF16"  #: computed in: "F32" or "BF16"


@dataclass(frozen=True, slots=True)
class Attributing:
    """How the loss is attributed to the teacher's layers; everything that its result depends on."""

    examples: int = 32  #: the first so many
    absolute: bool = False  #: |a ⊙ ∂L/∂a| is taken of each element, before the sum


@dataclass(frozen=True, slots=True)
class States:
    """The options of mapped activations."""

    interface: str = "hidden"  #: mlp, attn, block, hidden or span
    map: str = "dual"
    dtype: str = "BF16"  #: stored in: "BF16", "F16" or "F32"
    pairs: tuple[LayerPair, ...] | None = None  #: ``None``: attribution chooses
    critical: int = 0  #: highest layers that lead to pairs; 0: a layer for each of the student's
    interpolate: bool = False
    attributing: Attributing | None = None  #: ``None``: no pair depends on it
    fold_norm: bool = True  #: into the heads that a map is made from
    seed: int = 0  #: of the map ``random``
    fitted_on: int = 0  #: the first so many examples have the map of each pair fitted on; 0: none

    @property
    def needs_channels(self) -> bool:
        """Whether the map is made from the attribution of channels."""
        return MAPS[self.map].needs == "channels"

    def identity(self) -> dict[str, Any]:
        """What the states depend on, JSON."""
        found: dict[str, Any] = {
            "interface": self.interface,
            "map": self.map,
            "dtype": self.dtype,
            "fold_norm": self.fold_norm,
            "seed": self.seed,
        }
        if self.pairs is not None:
            found["pairs"] = [asdict(pair) for pair in self.pairs]
        else:
            found |= {"critical": self.critical, "interpolate": self.interpolate}
        if self.attributing:
            found["attribution"] = asdict(self.attributing)
        if self.fitted_on:
            found["fitted_on"] = self.fitted_on
        return found


@dataclass(frozen=True)
class Aligned:
    """The examples as a teacher of another tokenizer reads them."""

    texts: SampleSet  #: of those with a place at which both tokenizations end together
    text_of: tuple[int | None, ...]  #: of each example the number of its text
    positions: tuple[tuple[int, ...], ...]  #: of each text, ascending
    tokens: tuple[tuple[int, ...], ...]  #: of each example the answer tokens they predict

    @property
    def rows(self) -> int:
        """Answer tokens that have a state."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Task:
    """Everything that a recording needs, opened and planned."""

    teacher: Model
    samples: SampleSet
    vocabulary_sha256: str
    plan: Plan
    config: Config
    data_options: Mapping[str, Any]  #: template, max_tokens, max_examples
    states: States | None = None  #: ``None``: logits alone
    student: Model | None = None  #: whose width the states have
    shared: SharedTokens | None = None  #: of both vocabularies, where states are mapped
    aligned: Aligned | None = None  #: ``None``: both models read the same tokens
    kinds: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  #: attention of either one's layers
    resident: bool = False  #: the teacher is to stay in memory, nothing is written

    @property
    def texts(self) -> tuple[Sample, ...]:
        """What the teacher reads."""
        return self.aligned.texts.samples if self.aligned else self.samples.samples

    @cached_property
    def positions(self) -> list[torch.Tensor]:
        """The positions of each text that predict the answer tokens."""
        if self.aligned:
            return [torch.tensor(each, dtype=torch.long) for each in self.aligned.positions]
        return [torch.tensor(s.loss_mask).nonzero()[:, 0] - 1 for s in self.texts]

    def text_of(self, example: int) -> int | None:
        """The number of the text that an example is to the teacher."""
        return self.aligned.text_of[example] if self.aligned else example

    @property
    def answers(self) -> list[int]:
        """Answer tokens of each example."""
        return [sample.loss_tokens for sample in self.samples.samples]

    @cached_property
    def shards(self) -> list[Shard]:
        """The files that the result has."""
        return layout(self.answers, self.config.top_k)

    @property
    def spool_dir(self) -> Path | None:
        """Where the user wants hidden states meanwhile."""
        given = self.plan.room.spool_dir if self.plan.room else None
        return Path(given) if given else None

    def identity(self) -> dict[str, Any]:
        """What makes a recording this one: the manifest without what it found."""
        more: dict[str, Any] = {}
        if self.states and self.student:
            more = {"student": self.student.hashes(), "states": self.states.identity()}
        if self.aligned:
            more["texts"] = self.aligned.texts.sha256
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "targets",
            "teacher": self.teacher.hashes(),
            "data": {
                "count": len(self.samples.samples),
                "left_out": len(self.samples.masked),
                "tokens": self.samples.tokens,
                "loss_tokens": self.samples.loss_tokens,
                "sha256": self.samples.sha256,
            },
            "vocabulary": {"rows": self.config.rows, "sha256": self.vocabulary_sha256},
            "options": {
                "top_k": self.config.top_k,
                "dtype": self.config.dtype,
                **self.data_options,
            },
            **more,
        }
