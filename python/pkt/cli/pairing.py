"""Pairs of layers and what they are chosen by, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pkt.cli.tables import aligned

if TYPE_CHECKING:
    from pkt.methods.targeting import Task

_WORDS = {
    "mlp": "what each MLP adds",
    "attn": "what each attention adds",
    "block": "what each layer does",
    "hidden": "the state behind each layer",
    "span": "the state behind each layer, less that behind the pair below",
}


def states_rows(task: Task) -> list[tuple[str, str]]:
    """What is kept of the teacher's activations."""
    assert task.states
    assert task.student
    states = task.states
    rows = task.aligned.rows if task.aligned else task.samples.loss_tokens
    kept = f"{_WORDS[states.interface]}, map {states.map}, {task.student.hidden_size} wide"
    found = [("states", f"{kept}, {states.dtype}")]
    if task.aligned:
        assert task.shared
        share = f"{rows} of {task.samples.loss_tokens} answer tokens"
        found.append(
            ("aligned", f"{share}; {task.shared.coverage:.1%} of the smaller vocabulary is shared")
        )
    if states.fitted_on:
        count = min(states.fitted_on, len(task.texts))
        of = ", of the channels of highest attribution" if states.needs_channels else ""
        found.append(("maps", f"one for each pair, fitted on {count} examples{of}"))
    if states.attributing and states.pairs is None:
        count = min(states.attributing.examples, len(task.texts))
        rule = (
            f"the {states.critical} highest lead to pairs"
            if states.critical
            else ("the highest of each stretch is paired")
        )
        found.append(("layers", f"by attribution over {count} examples: {rule}"))
    return found


def pairing_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A line a pair; pairs of unlike attention are starred and mentioned."""
    mixed = any(pair["mix"] for pair in pairs)
    head = ["teacher layer", "student layer", *(["mixed with the next"] if mixed else [])]
    body = [
        [
            str(pair["teacher"]),
            str(pair["student"]) + ("*" if pair["unlike"] else ""),
            *([f"{pair['mix']:.2f}"] if mixed else []),
        ]
        for pair in pairs
    ]
    text = aligned([head, *body], right=range(len(head)))
    if any(pair["unlike"] for pair in pairs):
        text += "\n* the attention of one slides over a window, that of the other does not"
    return text


def ranking_table(manifest: Mapping[str, Any]) -> str:
    """Teacher layers by attribution, the highest first."""
    scores = manifest["attribution"]["scores"]
    paired = {pair["teacher"]: str(pair["student"]) for pair in manifest["pairs"]}
    order = sorted(range(1, len(scores) + 1), key=lambda layer: (-scores[layer - 1], layer))
    head = ("teacher layer", "A", "paired with")
    body = [(str(layer), f"{scores[layer - 1]:.4g}", paired.get(layer, "")) for layer in order]
    return aligned([head, *body], right=(0, 1, 2))
