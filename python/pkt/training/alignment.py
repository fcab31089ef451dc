"""SEMALIGN's objectives: a student layer's activations against the teacher's, mapped.

Gu et al., "Beyond Neural Incompatibility", arXiv 2510.24208. For student layer k, at the positions
that predict answer tokens, with targets t of the teacher layer it is paired with:

============== ======== ============================================== ========================
objective      h_k      layer loss                                     beside it
============== ======== ============================================== ========================
`v1`           any      mean of 1 − cos(h_k, t), over pairs too        output loss
`v2`           span     mean over samples of 1 − CKA(h_k, t)           β · KL(teacher ‖ student)
`acl`          hidden   mean of ½ Var_p[z − z*]; none in the last      in the last layer the KL
`hidden-mse`   hidden   mean of ‖h_k − c t‖² / mean ‖h⁰_k‖²            output loss
============== ======== ============================================== ========================

z = head(norm(h_k)), z* = head(norm(t)), p = softmax(z*); "span" is h_k − h_{k−1}, and of the
teacher what lies between the two layers paired with these. v1 and hidden-mse train all paired
layers at once; v2 and acl one after another, from shallow to deep. Output losses: `cosine`,
1 − mean cos(z, onehot(y)); `ce`, the labels' cross-entropy; `kl`, weighted with β, of the teacher's
k largest logits, the rest one bin (`divergence`). v2 and acl are our reading of two abstracts.

hidden-mse is a control, an ordinary squared error. The scale of a mapped state means nothing (the
final norm removes it), so c is one number a layer: it gives the targets the root mean square of the
untrained student's states h⁰ on the first examples, which is the unit of the error too. A scale for
each token would make the error 2 − 2 cos: v1 under another name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn import functional

from pkt.records import LayerPair, Sample, TopLogits
from pkt.training.activations import View, require_parts, require_readout, watching
from pkt.training.distances import cosine_distances, fisher_distances, geometry_distance
from pkt.training.objective import Said, divergence, log_bins

MEASURED = 32  # examples that hidden-mse takes its scales from


class Supervision(Protocol):
    """What a teacher leaves of its training examples: `pkt.targets.Targets`, opened."""

    pairs: tuple[LayerPair, ...]
    answers: Sequence[int]

    def of(self, example: int) -> TopLogits:
        """Its logits at each answer token."""

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        """Mapped activations (m, D_S) for a student layer."""

    def aligned(self, example: int) -> torch.Tensor:
        """Which answer token each of these rows belongs to, (m,) ascending."""


@dataclass(frozen=True)
class Alignment(ABC):
    """What the four have in common.

    Args:
        targets: of the teacher, on the very training data.
        interface: of the student's activations: mlp, attn, block, hidden or span.
        student_layers: L_S.
        vocabulary: tokens that both models know; what is beyond is padding.
        output_loss: ``cosine``, ``ce`` or ``kl``; of v1 and hidden-mse.
        kl_weight: β, of a KL beside a layer loss.

    """

    targets: Supervision
    interface: str
    student_layers: int
    vocabulary: int
    output_loss: str = "cosine"
    kl_weight: float = 1.0

    reads_out = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The paired student layers, ascending."""
        return tuple(sorted(pair.student for pair in self.targets.pairs))

    @property
    def stages(self) -> tuple[int, ...]:
        """None: all layers are trained at once."""
        return ()

    @property
    def needs_logits(self) -> bool:
        """Whether any part of the loss is made of the teacher's logits."""
        return self.output_loss == "kl"

    def ready(self, model: Any, samples: Sequence[Sample]) -> Alignment:
        """Itself, once the model is known to have the places that the interface names."""
        if self.interface in ("mlp", "attn"):
            require_parts(model, self.layers[0], samples[0])
        return self

    def views(self, frontier: int | None) -> tuple[View, ...]:
        """The paired layers', or the frontier's."""
        chosen = self.layers if frontier is None else (frontier,)
        return tuple(View(layer, self.interface) for layer in chosen)

    def rows(self, example: int) -> int:
        """Answer tokens of an example that have a state."""
        return len(self.targets.aligned(example))

    def columns(self, examples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The teacher's logits, if they count; states are read layer by layer, in `loss`."""
        if not self.needs_logits:
            return {}
        return log_bins([self.targets.of(example) for example in examples])

    def loss(self, said: Said) -> dict[str, torch.Tensor]:
        """Layer loss and output loss."""
        distances = [self._distance(said, view) for view in self.views(said.frontier)]
        parts = {"layer": torch.stack(distances).mean()}
        output = self._output(said)
        return parts if output is None else {**parts, "output": output}

    @abstractmethod
    def _distance(self, said: Said, view: View) -> torch.Tensor:
        """The layer loss of one layer."""

    def _output(self, said: Said) -> torch.Tensor | None:
        logits, tokens = said.logits.float(), said.tokens
        if self.output_loss == "kl":
            return self.kl_weight * self._divergence(said)
        if self.output_loss == "ce":
            return functional.cross_entropy(logits, tokens, reduction="sum") / said.totals.tokens
        known = logits[:, : self.vocabulary]
        chosen = known.gather(-1, tokens[:, None])[:, 0]
        cosines: torch.Tensor = chosen / known.norm(dim=-1).clamp_min(1e-8)
        return (1 - cosines).sum() / said.totals.tokens

    def _divergence(self, said: Said) -> torch.Tensor:
        """KL(teacher ‖ student), mean over the answer tokens of the step."""
        columns, logits = said.columns, said.logits.float()[:, : self.vocabulary]
        summed = divergence(logits, columns["teacher_ids"], columns["teacher_logs"])
        mean: torch.Tensor = summed / said.totals.tokens
        return mean

    def _both(self, said: Said, view: View) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """States and targets (rows, D) of the tokens that have one, and how many a sample has."""
        assert said.activation is not None
        ours, first = said.activation(view), 0
        rows, theirs = [], []
        for example in said.examples:
            rows.append(self.targets.aligned(example) + first)
            theirs.append(self.targets.states(example, view.layer))
            first += self.targets.answers[example]
        assert first == len(ours), (first, len(ours))
        wanted = torch.cat(theirs).to(ours.device, torch.float32)
        return ours[torch.cat(rows).to(ours.device)], wanted, [len(each) for each in rows]


@dataclass(frozen=True)
class CosineAlignment(Alignment):
    """v1: directions."""

    def _distance(self, said: Said, view: View) -> torch.Tensor:
        ours, theirs, _ = self._both(said, view)
        return cosine_distances(ours, theirs).sum() / max(said.totals.rows, 1)


@dataclass(frozen=True)
class SquaredAlignment(Alignment):
    """hidden-mse: squared errors, in units of the untrained student's mean square."""

    sizes: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By student layer: root mean square norm of its own states, and of the targets."""

    def ready(self, model: Any, samples: Sequence[Sample]) -> Alignment:
        """With the sizes of states and targets of the first examples."""
        views = super().ready(model, samples).views(None)
        sums = {view.layer: [0.0, 0.0, 0] for view in views}
        training = model.training
        model.eval()
        for example, sample in enumerate(samples[:MEASURED]):
            ids = torch.tensor([sample.tokens], device=model.device)
            counted = torch.tensor([sample.loss_mask[1:]], device=model.device)
            with torch.no_grad(), watching(model, views) as seen:
                model(input_ids=ids, use_cache=False)
            for view in views:
                rows = seen.of(view, counted)[self.targets.aligned(example).to(model.device)]
                theirs, held = self.targets.states(example, view.layer), sums[view.layer]
                held[0] += float(rows.double().square().sum())
                held[1] += float(theirs.double().square().sum())
                held[2] += len(rows)
        model.train(training)
        sizes = {
            layer: ((own / max(count, 1)) ** 0.5, (their / max(count, 1)) ** 0.5)
            for layer, (own, their, count) in sums.items()
        }
        return replace(self, sizes=sizes)

    def _distance(self, said: Said, view: View) -> torch.Tensor:
        ours, theirs, _ = self._both(said, view)
        own, their = (max(size, 1e-30) for size in self.sizes[view.layer])
        return (ours / own - theirs / their).square().sum() / max(said.totals.rows, 1)


@dataclass(frozen=True)
class GeometryAlignment(Alignment):
    """v2: how the tokens of a sample lie to one another, layer by layer."""

    @property
    def stages(self) -> tuple[int, ...]:
        """The paired layers, from shallow to deep."""
        return self.layers

    @property
    def needs_logits(self) -> bool:
        """Unless β is 0."""
        return self.kl_weight > 0

    def _distance(self, said: Said, view: View) -> torch.Tensor:
        ours, theirs, counts = self._both(said, view)
        distances = [
            geometry_distance(one, other)
            for one, other in zip(ours.split(counts), theirs.split(counts), strict=True)
            if len(one) >= 2
        ]
        total = torch.stack(distances).sum() if distances else ours.sum() * 0.0
        return total / max(said.totals.samples, 1)

    def _output(self, said: Said) -> torch.Tensor | None:
        return self.kl_weight * self._divergence(said) if self.kl_weight else None


@dataclass(frozen=True)
class FisherAlignment(Alignment):
    """acl: logits read out of a layer, weighted with their Fisher information; KL in the last."""

    reads_out = True

    @property
    def stages(self) -> tuple[int, ...]:
        """The paired layers, from shallow to deep."""
        return self.layers

    @property
    def needs_logits(self) -> bool:
        """If the last layer is paired."""
        return self.student_layers in self.layers

    def ready(self, model: Any, samples: Sequence[Sample]) -> Alignment:
        """Itself, once the model's logits are known to be head(norm(h))."""
        require_readout(model, self.student_layers, samples[0])
        return self

    def views(self, frontier: int | None) -> tuple[View, ...]:
        """The frontier's; none in the last layer, where the model's own logits count."""
        return () if frontier == self.student_layers else super().views(frontier)

    def loss(self, said: Said) -> dict[str, torch.Tensor]:
        """The surrogate, or in the last layer the KL."""
        views = self.views(said.frontier)
        if not views:
            return {"output": self._divergence(said)}
        return {"layer": self._distance(said, views[0])}

    def _distance(self, said: Said, view: View) -> torch.Tensor:
        ours, theirs, _ = self._both(said, view)
        assert said.readout is not None
        with torch.no_grad():
            wanted = said.readout(theirs)[:, : self.vocabulary]
        found = said.readout(ours)[:, : self.vocabulary]
        return fisher_distances(found, wanted).sum() / max(said.totals.rows, 1)


ALIGNMENTS: dict[str, type[Alignment]] = {
    "v1": CosineAlignment,
    "v2": GeometryAlignment,
    "acl": FisherAlignment,
    "hidden-mse": SquaredAlignment,
}
