"""What the teacher says at each answer token: its logits, from the last boundary in the spool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pkt.config import LOGIT_ELEMENTS
from pkt.sweep.names import boundary

if TYPE_CHECKING:
    from pkt.sweep.passes import Sweep

Block = tuple[int, torch.Tensor, torch.Tensor]


@torch.no_grad()
def answer_logits(sweep: Sweep, first: int = 0) -> Iterator[Block]:
    """The logits at every answer token, made in blocks of a constant size, so that V x n never is.

    Args:
        sweep: whose spool holds the last boundary, as `Sweep.forward` leaves it.
        first: seed to begin with.

    Yields:
        (seed, tokens (m,), logits (m, V) float32) of m answer tokens of one seed, each predicted at
        the position before it; the blocks of a seed follow each other.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        PktError: a logit is.

    """
    head = sweep.source.read({"head": sweep.placement.head})["head"]
    last = boundary(len(sweep.skeleton.layers))
    step = max(1, LOGIT_ELEMENTS // head.shape[0])
    for number in range(first, len(sweep.seeds)):
        seed = sweep.seeds[number]
        hidden = sweep.spool.read(last, number).to(sweep.device)
        if number == first:
            sweep.check_head(hidden, head)
        tokens = torch.tensor(seed.tokens, device=sweep.device)
        at = torch.tensor(seed.loss_mask, device=sweep.device).nonzero()[:, 0]
        for part in at.split(step):
            logits = sweep.skeleton.logits(hidden[part - 1], head, sweep.outer).float()
            if not bool(torch.isfinite(logits).all()):
                pieces = {"head": sweep.placement.head, **sweep.placement.outer()}
                raise sweep.not_finite(pieces, {"head": head, **sweep.outer}, seed, "logits")
            yield number, tokens[part], logits
