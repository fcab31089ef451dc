"""A start inside a PEFT model: `W* = (W_S − B₀A₀) + BA`, with W_S left as it is.

A LoRA layer computes ``W_S x + BA·dropout(x)``; one with a start computes

    W_S x + BA·dropout(x) − B₀A₀ x

so at step 0 (B = B₀, A = A₀, dropout off) the two products are the same numbers, their difference
is zero, and the model is the student in any dtype of its weights. The frozen half sees no
dropout: noise of the teacher's size would reach W_S. It is a pair of buffers, neither a parameter
nor an adapter, so no optimizer, checkpoint or `set_adapter` can touch it, and a resumed run has it
by construction. A base from which B₀A₀ is subtracted costs nothing at run time, but rounds: in
bfloat16 its step 0 is off by about 3e-3 of each matrix.

Source: arXiv 2310.11451, §3.2. Hooks into PEFT by its `LoraVariant` (huggingface/peft, version
0.17 and later).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, LoraLayer, LoraVariant
from torch.autograd.function import once_differentiable

from pkt.records import LowRank

ADAPTER = "default"
_PREFIX = "base_model.model."


def inject(
    model: Any,
    trained: Mapping[str, LowRank],
    frozen: Mapping[str, LowRank] | None,
    dropout: float = 0.0,
) -> Any:
    """Wrap ``model`` as a PEFT model whose LoRA layers begin at ``trained``.

    Args:
        model: a transformers model; its weights are neither changed nor copied.
        trained: B and A of each module to adapt, by full module name; copied in float32.
        frozen: what is subtracted, by the same names; ``None`` where nothing is (an ordinary
            LoRA start, whose B is zero).
        dropout: on the input of the trained half.

    Returns:
        the PEFT model; its LoRA factors are its only parameters that ask for gradients.

    """
    ranks = {name: int(half.a.shape[0]) for name, half in trained.items()}
    rank = max(ranks.values())
    smaller = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=dropout,
        target_modules=sorted(trained),
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    found = dict(_lora_layers(wrapped))
    assert found.keys() == trained.keys(), set(found) ^ set(trained)
    with torch.no_grad():
        for name, layer in found.items():
            a, b = _weights(layer)
            a.copy_(trained[name].a)
            b.copy_(trained[name].b)
            if frozen is not None:
                _subtract(layer, frozen[name], a.device)
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counted == sum(h.a.numel() + h.b.numel() for h in trained.values()), counted
    return wrapped


def trained_factors(model: Any) -> dict[str, LowRank]:
    """The trained half of each module, in float32 on the CPU: copies."""
    return {
        name: LowRank(b.detach().float().cpu().clone(), a.detach().float().cpu().clone())
        for name, layer in _lora_layers(model)
        for a, b in [_weights(layer)]
    }


def frozen_factors(model: Any) -> dict[str, LowRank]:
    """The frozen half (B₀, A₀) of each module that has one, in float32 on the CPU."""
    return {
        name: LowRank(layer.start_B.cpu(), layer.start_A.cpu())
        for name, layer in _lora_layers(model)
        if hasattr(layer, "start_A")
    }


class _LinearStart(LoraVariant):  # type: ignore[misc]  # peft is untyped
    """A linear layer that subtracts its start; shapes (…, in) → (…, out), in ``result``'s dtype."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        dropout = module.lora_dropout[active_adapter]
        share = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
        a, b = _weights(module)
        with torch.autocast(x.device.type, enabled=False):  # both halves stay in float32
            moved: torch.Tensor = _Difference.apply(
                x, result, a, b, module.start_A, module.start_B, share
            )
        return moved


class _Difference(torch.autograd.Function):
    """``result + BA·dropout(x) − B₀A₀ x``, with as few passes over wide matrices as there can be.

    Autograd's own would copy the wide product for a subtraction that is not in place, read dy once
    for each half, and add two gradients of x: a tenth of a step of a bfloat16 student.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        result: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        start_a: torch.Tensor,
        start_b: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        narrow = kept @ a.T
        # Twice the same product at step 0, so their difference is exactly zero then.
        change = narrow @ b.T
        change.addmm_(rows @ start_a.T, start_b.T, alpha=-1)
        ctx.save_for_backward(kept, mask, narrow, a, b, start_a, start_b)
        ctx.dropout = dropout
        moved = torch.empty_like(result)
        return torch.add(result, change.view(result.shape), out=moved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, mask, narrow, a, b, start_a, start_b = ctx.saved_tensors
        wide = grad.reshape(-1, grad.shape[-1]).to(b.dtype)
        both = wide @ torch.cat((b, -start_b), dim=1)
        trained, frozen = both[:, : b.shape[1]], both[:, b.shape[1] :]
        into = None
        if ctx.needs_input_grad[0]:
            if mask is None:
                into = both @ torch.cat((a, start_a))
            else:
                into = (trained @ a).mul_(mask).mul_(1 / (1 - ctx.dropout))
                into.addmm_(frozen, start_a)
            into = into.view(*grad.shape[:-1], a.shape[1])
        return into, grad, trained.T @ kept, wide.T @ narrow, None, None, None


class _EmbeddingStart(LoraVariant):  # type: ignore[misc]
    """An embedding that subtracts its start; token ids (…) → (…, hidden)."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        a, b = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
        change = F.embedding(x, a.T) @ b.T - F.embedding(x, module.start_A.T) @ module.start_B.T
        scale = module._get_embed_scale()  # Gemma multiplies its embeddings
        if scale is not None:
            change = change * scale.to(change.dtype)
        total: torch.Tensor = result + change
        return total


def _subtract(layer: Any, half: LowRank, device: torch.device) -> None:
    for name, value in (("start_A", half.a), ("start_B", half.b)):
        copied = value.to(device, torch.float32, copy=True).contiguous()
        layer.register_buffer(name, copied, persistent=False)
    kind = _EmbeddingStart if isinstance(layer, Embedding) else _LinearStart
    layer.lora_variant[ADAPTER] = kind()


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(_PREFIX), module


def _weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
