"""The order of a sweep: which layer is used when, and which boundaries the disk holds meanwhile.

Boundary i is the file with the inputs of layer i for every seed; boundary L holds the outputs of
the last layer. The forward pass leaves every k-th of them, and all of its last segment; on the way
back each other segment of k layers is run forward once more from its boundary. The plan counts by
the same steps that the sweep takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Step:
    """What is done at once: it leaves a boundary, or the gradients at one, whole or not at all.

    "embed" makes boundary 0, "forward" the one behind its layer, "head" the gradients at
    boundary L, "backward" those at the inputs of its layer, "targets" what is wanted of the
    hidden states at the boundary of its number.
    """

    kind: Literal["embed", "forward", "head", "backward", "targets"]
    layer: int
    again: bool = False  #: it has been done before: its file was not kept, or is lost
    drops: tuple[int, ...] = ()  #: boundaries that neither it nor a later step reads


def schedule(
    depth: int,
    every: int,
    *,
    held: Collection[int] = (),
    pending: int | None = None,
    upstream: int | None = None,
    last: bool = False,
) -> list[Step]:
    """The steps that are left of a sweep.

    Args:
        depth: L, the number of layers.
        every: k; the forward pass leaves every k-th boundary.
        held: boundaries that are there.
        pending: layers 0 to ``pending`` − 1 are to be swept backward; ``None``: all of them.
        upstream: lowest boundary, ``pending`` or above, whose gradients are there, and the losses.
        last: boundary L is wanted in the end, with the gradients at boundary 0.

    """
    pending = depth if pending is None else pending
    top = depth if upstream is None else upstream  # layers still to go backward, again or not
    target = depth if last or upstream is None else top - 1
    kept = {b for b in held if b < top and (b % every == 0 or b >= _segment(top - 1, every))}
    if below := [b for b in held if b <= target]:
        kept.add(max(below))  # to go on from
    steps: list[Step] = []

    def make(boundary: int, first: int, again: bool) -> None:
        """Steps to ``boundary``; of those on the way, the ones from ``first`` on are kept."""
        start = max((b for b in kept if b <= boundary), default=None)
        if start is None:
            steps.append(Step("embed", 0, again))
            start = 0
        steps.extend(Step("forward", layer, again) for layer in range(start, boundary))
        kept.update(b for b in range(start, boundary + 1) if b % every == 0 or b >= first)

    def backward(layers: range, again: bool) -> None:
        for layer in reversed(layers):
            make(layer, _segment(layer, every), again=True)
            steps.append(Step("backward", layer, again))

    if upstream is None:
        make(depth, _segment(depth - 1, every), again=pending < depth)
        steps.append(Step("head", depth, again=pending < depth))
    elif last:
        make(depth, _segment(top - 1, every) if top else depth, again=True)
    if pending or last:
        backward(range(pending, top), again=True)
    backward(range(pending), again=False)
    return _with_drops(steps, held, {depth} if last else set())


def forward_schedule(wanted: Collection[int], held: Collection[int] = ()) -> list[Step]:
    """The steps of one pass forward: nothing of the teacher is used twice.

    Args:
        wanted: boundaries of which targets are to be made, in ascending order as they come by.
        held: boundaries that are there: the highest one below all that are wanted is gone on from.

    """
    pending = sorted(set(wanted))
    if not pending:
        return []
    at = max((b for b in held if b <= pending[0]), default=None)
    steps = [Step("embed", 0)] if at is None else []
    for boundary in range(at or 0, pending[-1] + 1):
        if boundary in pending:
            steps.append(Step("targets", boundary))
        if boundary < pending[-1]:
            steps.append(Step("forward", boundary))
    return _with_drops(steps, held, set())


def peak_boundaries(depth: int, every: int, last: bool) -> int:
    """The most files of one (N, D) tensor, boundaries and gradients, that a sweep has at once."""
    held: set[int] = set()
    gradients = most = 0
    for step in schedule(depth, every, last=last):
        held -= set(step.drops)
        held |= _made(step)
        gradients += step.kind in ("head", "backward")
        gathered = step.kind == "embed"  # the embedding rows of every token
        most = max(most, len(held) + gradients + gathered)
        gradients = min(gradients, 1)
    return most


def turns(order: Sequence[Any], slots: int) -> list[int | None]:
    """For each use the earlier one whose slot still holds it, or ``None``: it must be read.

    Where the order turns round, …, a, b, c, c, b, a, … or …, a, b, c, b, a, …, as many jobs as
    there are slots stay where they are until their second use.
    """
    kept: list[int | None] = [None] * len(order)
    full = [1] * len(order)  # slots taken during a use: its own, and those kept for later ones
    for middle in range(2 * len(order) - 1):
        first, second = (middle - 1) // 2, middle // 2 + 1
        while first >= 0 and second < len(order) and order[first] == order[second]:
            between = range(first + 1, second)
            if kept[first] is not None or first in kept or any(full[b] == slots for b in between):
                break  # a slot is given up after the second use
            kept[second] = first
            for use in between:
                full[use] += 1
            first, second = first - 1, second + 1
    return kept


def _segment(layer: int, every: int) -> int:
    """The first layer of the segment that ``layer`` belongs to."""
    return layer - layer % every


def _made(step: Step) -> set[int]:
    return {step.layer + (step.kind == "forward")} if step.kind in ("embed", "forward") else set()


def _with_drops(steps: Sequence[Step], held: Collection[int], wanted: set[int]) -> list[Step]:
    """Each step with the boundaries that are there when it begins and are not read any more."""
    needed, live = [], set(wanted)
    for step in reversed(steps):
        live = (live - _made(step)) | ({step.layer} if step.kind != "embed" else set())
        needed.append(live)
    there, found = set(held), []
    for step, still in zip(steps, reversed(needed), strict=True):
        found.append(replace(step, drops=tuple(sorted(there - still))))
        there = (there & still) | _made(step)
    return found
