"""Some answer tokens of the first examples, at which both models are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pkt.methods.targeting.task import Task
from pkt.records import Sample


@dataclass(frozen=True, slots=True)
class Place:
    """An answer token, and where the teacher's text predicts it."""

    example: int
    token: int  #: which of the example's answer tokens, from 0
    text: int  #: the example as the teacher reads it
    at: int  #: position in that text


@dataclass(frozen=True, slots=True)
class Read:
    """Texts as one model reads them, and the positions of each that are looked at, ascending."""

    numbers: list[int]  #: of the texts, among all of the model's
    texts: list[Sample]
    positions: list[torch.Tensor]

    @property
    def lengths(self) -> list[int]:
        """Places of each text."""
        return [len(positions) for positions in self.positions]


def first_places(task: Task, examples: int, most: int) -> list[Place]:
    """The answer tokens of the first ``examples`` texts; of more than ``most``, spread evenly."""
    found: list[Place] = []
    for example, answers in enumerate(task.answers):
        text = task.text_of(example)
        if text is None:
            continue
        if text >= examples:
            break
        tokens = task.aligned.tokens[example] if task.aligned else range(answers)
        places = zip(tokens, task.positions[text].tolist(), strict=True)
        found += [Place(example, token, text, at) for token, at in places]
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def of_teacher(task: Task, places: Sequence[Place]) -> Read:
    """The places in the teacher's texts."""
    grouped: dict[int, list[int]] = {}
    for place in places:
        grouped.setdefault(place.text, []).append(place.at)
    return _read(task.texts, grouped)


def of_student(task: Task, places: Sequence[Place]) -> Read:
    """The same places in the examples as the student reads them."""
    grouped: dict[int, list[int]] = {}
    for place in places:
        mask = task.samples.samples[place.example].loss_mask
        answers = [at for at, counts in enumerate(mask) if counts]
        grouped.setdefault(place.example, []).append(answers[place.token] - 1)
    return _read(task.samples.samples, grouped)


def _read(texts: Sequence[Sample], grouped: dict[int, list[int]]) -> Read:
    positions = [torch.tensor(each, dtype=torch.long) for each in grouped.values()]
    return Read(list(grouped), [texts[number] for number in grouped], positions)
