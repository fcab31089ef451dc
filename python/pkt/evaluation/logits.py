"""Logits at the answer positions of samples, a few positions at a time.

A batch goes through the decoder once. Its head, and whatever the family does behind it (soft
caps, logit scales), is then called on chunks of the last hidden states through the model's own
forward, so the largest tensor is one chunk of logits, whatever vocabulary and length are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pkt.records import Sample

CHUNK_ELEMENTS = 1 << 24  #: of logits made at once: 64 MiB in float32


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of similar length, right-padded, and where their answers are.

    ``ids`` and ``mask`` are (B, n); ``row``, ``position`` and ``target`` (k,) name, for each of
    the k answer tokens, its sample in the batch, the position it is predicted at, and the token.
    """

    indices: tuple[int, ...]  #: of its samples in the list they came from
    ids: torch.Tensor
    mask: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor


def batches(samples: Sequence[Sample], batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Samples from the longest to the shortest (ties in their order), padding counted.

    Args:
        samples: of any length; the tokens behind the last answer token are not read.
        batch_tokens: most tokens in a batch, padding included; a longer sample stands alone.
        device: of the tensors.

    """
    # The last token predicts nothing: it is a target only.
    lengths = [_last(sample.loss_mask) for sample in samples]
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        chosen, order = order[:count], order[count:]
        width = lengths[chosen[0]]
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        wanted = []
        for row, index in enumerate(chosen):
            sample, length = samples[index], lengths[index]
            ids[row, :length] = torch.tensor(sample.tokens[:length])
            mask[row, :length] = 1
            wanted += [
                (row, i - 1, sample.tokens[i])
                for i, counts in enumerate(sample.loss_mask)
                if counts
            ]
        row_, position, target = torch.tensor(wanted, device=device).unbind(1)
        yield Batch(tuple(chosen), ids.to(device), mask.to(device), row_, position, target)


class AnswerLogits:
    """A causal model's logits at the answer positions of one batch.

    Args:
        model: transformers' …ForCausalLM, or a PeftModel whose adapter lies in its modules.
        batch: on the model's device.

    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._model = plain_model(model)
        self._decoder = self._model.get_decoder()
        self._output = self._decoder(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
        )
        hidden: torch.Tensor = self._output.last_hidden_state
        self._hidden = hidden[batch.row, batch.position]  # (k, D)
        self._output.last_hidden_state = self._hidden[:0]  # the rest is not needed any more

    def __getitem__(self, part: slice) -> torch.Tensor:
        """Logits of the answer tokens ``part``, (n, V) float32."""
        hidden = self._hidden[part][None]
        # The decoder's own kind of output: some families read more of it than its hidden state.
        output = replace(self._output, last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        self._decoder.forward = lambda *_, **__: output
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            del self._decoder.forward  # the class's own shows again
        return logits[0].float()


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel (its adapter layers in place), else ``model``."""
    return getattr(model, "get_base_model", lambda: model)()


def parts(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of ``count`` positions whose logits hold at most CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; every module's mode is restored."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def vocabulary_rows(model: nn.Module) -> int:
    """Columns of the logits."""
    return int(plain_model(model).config.get_text_config().vocab_size)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _last(mask: Sequence[bool]) -> int:
    """Index of the last true entry; 0 if there is none, since ``mask[0]`` is false."""
    return max((index for index, counts in enumerate(mask) if counts), default=0)
