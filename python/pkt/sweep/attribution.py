"""Which layers of a teacher the answer hangs on: gradient × activation, in two streamed passes.

As `pkt.sweep.passes`, but only activations have gradients: no weight has a gradient buffer, and a
layer's record is one number a seed. Of what a layer adds to the residual stream, a, and the answer
loss L of a seed it is ``|Σ_{t,c} a ⊙ ∂L/∂a|`` over its tokens t and channels c; if it is asked for,
``|Σ_t a ⊙ ∂L/∂a|`` of each channel too.

Source: Gu et al., arXiv 2510.24208.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from pkt.processes import wait_for_all
from pkt.sweep.names import boundary, record_of, upstream_of
from pkt.sweep.passes import Sweep
from pkt.sweep.roles import Observer, Weights

Added = Literal["attn", "mlp", "block"]


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the loss of the seeds hangs on."""

    layers: list[float]  #: A of each
    channels: list[list[float]]  #: of each layer that of its channels (D,); empty: not asked for


class AttributionSweep(Sweep):
    """A `Sweep` whose backward pass attributes the loss to what layers add."""

    def attribute(
        self, added: Added, *, absolute: bool = False, channels: bool = False
    ) -> Attribution:
        """A of each layer: the mean over seeds of ``|Σ_{t,c} a ⊙ ∂L/∂a|``, summed in float64.

        A hidden state itself has no such number: it feeds norms that no scale changes, so its
        signed sum is zero (Euler's theorem).

        Args:
            added: a: the output of a sub-layer as it is added, or ``h_out − h_in`` ("block"), whose
                gradient is that of h_out.
            absolute: the absolute value is taken of each element, before the sum.
            channels: whether each channel's is wanted: the mean over seeds of ``|Σ_t a ⊙ ∂L/∂a|``.

        Raises:
            As `Sweep.run`.

        """
        self._added, self._absolute, self._channels = added, absolute, channels
        _, records = self.run(cast("Observer", self))  # `_backward` itself observes
        count = len(self.seeds)
        return Attribution(
            [sum(record["seeds"]) / count for record in records],
            [[each / count for each in record["channels"]] for record in records]
            if channels else [],
        )  # fmt: skip

    def _backward(self, index: int, weights: Weights, observer: Observer | None) -> None:
        sums = []
        by_channel = torch.zeros(self.spool.width, dtype=torch.float64, device=self.device)
        parts = self.skeleton.sublayers(index)
        with self.spool.writer(upstream_of(index)) as out, parts:
            for number, seed in enumerate(self.seeds):
                hidden = self.spool.read(boundary(index), number).to(self.device)
                upstream = self.spool.read(upstream_of(index + 1), number).to(self.device)
                args, kwargs = self.calls.of(len(seed.tokens), index)
                leaf = hidden.requires_grad_()
                result = self._apply(index, weights, leaf[None], args, kwargs)
                if self._added == "block":
                    (gradient,) = torch.autograd.grad(result, leaf, upstream[None])
                    added, of_added = (result - leaf[None]).detach(), upstream[None]
                else:
                    added = parts.output(self._added)  # a factor behind it cancels in a ⊙ ∂L/∂a
                    gradient, of_added = torch.autograd.grad(result, [leaf, added], upstream[None])
                product = added.detach().double() * of_added.double()
                product = product.abs() if self._absolute else product
                sums.append(float(product.sum().abs()))
                if self._channels:
                    by_channel += product.flatten(0, -2).sum(0).abs()
                if not bool(gradient.isfinite().all()) or not sums[-1] < torch.inf:
                    raise self._bad_layer(index, weights, seed, "gradient")
                out.append(gradient)
        if observer:
            record: dict[str, Any] = {"seeds": sums}
            if self._channels:
                record["channels"] = by_channel.tolist()
            self.spool.put(record_of(index), record)
            self._records.insert(0, record)
            wait_for_all()
        self.spool.drop(upstream_of(index + 1))
