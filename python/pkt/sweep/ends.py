"""Column scores of the two ends, embedding and head, whose window slides over channels only.

The gradient of the head is dYᵀX over the loss positions of one seed, that of the embedding a sum
over the positions of each token. Where both are one tensor its gradient is their sum, and the
absolute value comes after it: the embedding's part exists only once layer 0 has been swept, so
the head is read, and its part made, again here. Neither gradient exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pkt.errors import PktError
from pkt.records import Sample
from pkt.sweep.names import boundary, upstream_of

if TYPE_CHECKING:
    from pkt.sweep.passes import Sweep

Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], bool | torch.Tensor]

ROW_ELEMENTS = 1 << 20  # gradient elements made at once


def column_scores(sweep: Sweep, accumulate: Accumulate) -> dict[str, list[float]]:
    """Σ over seeds and vocabulary rows of ``|θ · ∂L_j/∂θ|``, by hidden channel.

    Args:
        sweep: whose backward pass is done; its last hidden states are still in the spool.
        accumulate: adds the column sums of |weight · gradient| to its third argument.

    Returns:
        ``embedding`` and ``head``, D numbers each; the same ones where both are one tensor.

    Raises:
        PktError: a gradient is not finite.

    """
    depth = len(sweep.skeleton.layers)
    head = sweep.source.read({"head": sweep.placement.head})["head"]
    tied = _one_tensor(sweep)
    sums = {
        name: torch.zeros(head.shape[1], dtype=torch.float64, device=sweep.device)
        for name in ("embedding", "head")
    }
    pieces = sweep.placement.embedding_chunks()
    with sweep.gathered(sweep.source.read({"rows": p})["rows"] for p in pieces) as rows:
        blocks = rows.split(list(sweep.spool.lengths))
        for number, (seed, block) in enumerate(zip(sweep.seeds, blocks, strict=True)):
            tokens, weight, gradient = _embedding_gradient(sweep, number, seed, block)
            with _captured(sweep) as seen:
                hidden = sweep.spool.read(boundary(depth), number).to(sweep.device)
                sweep.loss(seed, hidden, head)
            x, dy = torch.cat(seen["x"]), torch.cat(seen["dy"])
            extra = (tokens, gradient) if tied else None
            finite = _score_head(head, x, dy, extra, accumulate, sums["head"])
            if not tied:
                finite &= accumulate(weight, gradient, sums["embedding"])
            if not finite:
                raise PktError(
                    f"seed {seed.name}: its gradient of embedding or head is not finite",
                    "try --dtype float32, or leave this seed out",
                )
            sweep.notify("ends", number + 1, len(sweep.seeds))
    if tied:
        sums["embedding"] = sums["head"]
    return {name: total.tolist() for name, total in sums.items()}


def _embedding_gradient(
    sweep: Sweep, number: int, seed: Sample, block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct tokens (k,), their rows (k, D), and one seed's gradient of those rows (k, D)."""
    ids = torch.tensor(seed.tokens, device=sweep.device)
    leaf = block.to(sweep.device).requires_grad_()
    entered = sweep.skeleton.prefix(leaf, sweep.outer)
    upstream = sweep.spool.read(upstream_of(0), number).to(sweep.device)
    (each,) = torch.autograd.grad(entered, leaf, upstream[None])
    if sweep.skeleton.padding_idx is not None:
        each[ids == sweep.skeleton.padding_idx] = 0  # torch gives look-ups of padding none
    tokens, where = ids.unique(return_inverse=True)
    gradient = torch.zeros(len(tokens), each.shape[1], device=each.device)
    gradient.index_add_(0, where, each.float())
    rows = torch.empty_like(each[: len(tokens)])
    rows[where] = leaf.detach()
    return tokens, rows, gradient.to(each.dtype)


def _score_head(
    head: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    extra: tuple[torch.Tensor, torch.Tensor] | None,
    accumulate: Accumulate,
    sums: torch.Tensor,
) -> bool | torch.Tensor:
    step = max(1, ROW_ELEMENTS // head.shape[1])
    finite: bool | torch.Tensor = True
    for start in range(0, head.shape[0], step):
        stop = min(start + step, head.shape[0])
        gradient = dy[:, start:stop].t() @ x
        if extra is not None:
            tokens, rows = extra
            here = (tokens >= start) & (tokens < stop)
            gradient.index_add_(0, tokens[here] - start, rows[here])
        finite &= accumulate(head[start:stop], gradient, sums)
    return finite


@contextmanager
def _captured(sweep: Sweep) -> Iterator[dict[str, list[torch.Tensor]]]:
    """X and dY of the head, a chunk of positions at a time."""
    seen: dict[str, list[torch.Tensor]] = {"x": [], "dy": []}
    linear = sweep.skeleton.model.get_submodule(sweep.skeleton.head.removesuffix(".weight"))

    def forward(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            seen["x"].append(args[0].detach().flatten(0, -2))
            output.register_hook(lambda gradient: seen["dy"].append(gradient.flatten(0, -2)))

    handle = linear.register_forward_hook(forward)
    try:
        yield seen
    finally:
        handle.remove()


def _one_tensor(sweep: Sweep) -> bool:
    """Whether head and embedding are tied, by the rule of transformers' loader.

    They are where the configuration says so and the checkpoint holds one of them, or both with
    the same values.
    """
    if not sweep.skeleton.may_tie:
        return False
    embedding, head = sweep.placement.embedding, sweep.placement.head
    if embedding == head:
        return True
    return all(
        torch.equal(
            sweep.source.read({"a": piece})["a"],
            sweep.source.read({"a": head.rows(start, start + piece.shape[0])})["a"],
        )
        for start, piece in _starts(sweep)
    )


def _starts(sweep: Sweep) -> Iterator[tuple[int, Any]]:
    start = 0
    for piece in sweep.placement.embedding_chunks():
        yield start, piece
        start += piece.shape[0]
