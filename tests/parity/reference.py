"""Reference of SEEKING, steps 1 to 4, for the tests: plain loops, full autograd, float64, full SVD.

Independent of `pkt`: it imports nothing of it and holds whole models and whole score tensors.
Here are sensitivity, layers and `extract`, which runs all; `reference_matrix.py` has what is done
to one matrix: logical parts, selection, factors. Indices count from 0; a weight is (out, in).

Source: Zhong et al., "Seeking Neural Nuggets", ICLR 2024, arXiv 2310.11451, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from reference_matrix import (
    Factors,
    Pick,
    best_window,
    expand_kv,
    factors,
    head_counts,
    pick_part,
    rows_cols,
    split_fused,
    stack_fused,
    top_weights,
    window_gap,
    window_sum,
    window_sums,
)

__all__ = [
    "Factors",
    "Pick",
    "Seed",
    "best_window",
    "expand_kv",
    "extract",
    "factors",
    "head_counts",
    "layer_scores",
    "layers_prefix",
    "load",
    "losses_and_scores",
    "pick_layers",
    "rows_cols",
    "seed_loss",
    "seed_losses_and_scores",
    "split_fused",
    "stack_fused",
    "top_weights",
    "window_gap",
    "window_sum",
    "window_sums",
]

Seed = tuple[list[int], list[bool]]


def load(folder: Path | str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Return the causal language model in `folder` in eval mode (dropout off)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval()


def seed_loss(model: nn.Module, ids: Sequence[int], mask: Sequence[bool]) -> Tensor:
    """Mean cross-entropy of the tokens that the mask says are predicted.

    `L = -1/|M| Σ_{i in M} log softmax(z_{i-1})[ids_i]`, M = {i >= 1 : mask_i}; z_{i-1} the logits
    at the position before token i. A mask without such an i raises ValueError.
    """
    predicted = [i for i in range(1, len(ids)) if mask[i]]
    if not predicted:
        raise ValueError("the seed has no token to predict")
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    before = [i - 1 for i in predicted]
    return F.cross_entropy(logits[before], torch.tensor([ids[i] for i in predicted]))


def losses_and_scores(
    model: nn.Module, seeds: Sequence[Seed]
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each seed and `S_i = Σ_j |θ_i · ∂L_j/∂θ_i|` by parameter name.

    The absolute value is taken in each seed, then summed. A tied parameter stands once, under its
    first name in `named_parameters` (the embedding's), with the gradient of all its uses.
    """
    scores = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    losses = []
    for ids, mask in seeds:
        model.zero_grad(set_to_none=True)
        loss = seed_loss(model, ids, mask)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                product = parameter.detach().double() * parameter.grad.double()
                scores[name] += product.abs()
    model.zero_grad(set_to_none=True)
    return losses, scores


def seed_losses_and_scores(
    folder: Path | str, seeds: Sequence[Seed], dtype: torch.dtype = torch.float64
) -> tuple[list[float], dict[str, Tensor]]:
    """`losses_and_scores` of the checkpoint in `folder`, computed in `dtype`, summed in float64."""
    return losses_and_scores(load(folder, dtype), seeds)


def layers_prefix(model: PreTrainedModel) -> str:
    """Return the name of the decoder layers' list with a dot behind it, as `model.layers.`."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}."
    raise ValueError(f"no list of {count} decoder layers in {type(model).__name__}")


def layer_scores(scores: dict[str, Tensor], layers_prefix: str, n: int) -> Tensor:
    """Score of each of n decoder layers, (n,) float64: Σ S over every parameter in it."""
    prefix = layers_prefix.rstrip(".")
    totals = torch.zeros(n, dtype=torch.float64)
    for name, score in scores.items():
        for i in range(n):
            if name.startswith(f"{prefix}.{i}."):
                totals[i] += score.double().sum()
    return totals


def pick_layers(layer_scores: Tensor, k: int) -> list[int]:
    """The k layers of highest score in ascending order; of equal ones the lower index wins."""
    if k > len(layer_scores):
        raise ValueError(f"the teacher has {len(layer_scores)} layers, the student {k}")
    ranked = sorted(range(len(layer_scores)), key=lambda i: (-float(layer_scores[i]), i))
    return sorted(ranked[:k])


def extract(
    teacher_folder: Path | str,
    student_folder: Path | str,
    seeds: Sequence[Seed],
    rank: int,
    split: str = "paper",
    select: str = "window",
    embeddings: bool = False,
) -> dict[str, Any]:
    """Run steps 1 to 4 and return everything on the way.

    Returns a dict of
        losses: loss of each seed; scores: teacher parameter name → S (float64);
        layer_scores: (L_T,); layers: teacher layer of each student layer, ascending;
        modules: full module name in the student → dict of
            parts: logical name → Pick (one, named as the module, where nothing is fused),
            weight: the selected weights stacked as the student stores them (n_S, m_S),
            factors: Factors of it, lora_A = a and lora_B = b; of weightᵀ for the embedding:
            lora_embedding_A = a (r, vocab), lora_embedding_B = b (hidden, r).

    Every nn.Linear of a decoder layer is a module; with `embeddings` also embedding and head.
    k_proj and v_proj are expanded to the teacher's query heads exactly when the student's have
    more rows than the teacher's.
    """
    teacher, student = load(teacher_folder), load(student_folder)
    losses, scores = losses_and_scores(teacher, seeds)
    prefix_t, prefix_s = layers_prefix(teacher), layers_prefix(student)
    totals = layer_scores(scores, prefix_t, teacher.config.num_hidden_layers)
    layers = pick_layers(totals, student.config.num_hidden_layers)
    modules: dict[str, Any] = {}
    for t, source in enumerate(layers):
        parts = logical_parts(teacher, f"{prefix_t}{source}.", scores)
        base = f"{prefix_s}{t}."
        for suffix, linear in linears(student, base):
            kind = (student.config.model_type, student.config, suffix)
            picks = {}
            for name, target in split_fused(*kind, linear.weight.detach()).items():
                if name not in parts:
                    raise ValueError(f"{prefix_t}{source}.{name}: the teacher has no such module")
                weight, score = parts[name]
                repeat = 1
                if name.endswith(("k_proj", "v_proj")) and len(target) > len(weight):
                    heads, kv_heads, head_dim = head_counts(teacher.config)
                    repeat = heads // kv_heads
                    weight = expand_kv(weight, head_dim, repeat, share=False)
                    score = expand_kv(score, head_dim, repeat, share=True)
                where = f"{prefix_t}{source}.{name}"
                shape = (target.shape[0], target.shape[1])
                picks[name] = pick_part(where, weight, score, shape, select, repeat)
            stacked = stack_fused(*kind, {n: p.weight for n, p in picks.items()})
            modules[base + suffix] = {
                "parts": picks,
                "weight": stacked,
                "factors": factors(stacked, rank, split),
            }
    if embeddings:
        modules |= extract_embeddings(teacher, student, scores, rank, split, select)
    return {
        "losses": losses,
        "scores": scores,
        "layer_scores": totals,
        "layers": layers,
        "modules": modules,
    }


def linears(model: nn.Module, base: str) -> list[tuple[str, nn.Linear]]:
    """The nn.Linear modules under `base` (a module's name and a dot), by their name below it."""
    inside = model.get_submodule(base.rstrip(".")).named_modules()
    return [(name, module) for name, module in inside if isinstance(module, nn.Linear)]


def logical_parts(
    teacher: PreTrainedModel, base: str, scores: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Logical name → (weight, scores) of everything that one teacher layer has to give."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for suffix, linear in linears(teacher, base):
        kind = (teacher.config.model_type, teacher.config, suffix)
        weights = split_fused(*kind, linear.weight.detach())
        score_parts = split_fused(*kind, scores[f"{base}{suffix}.weight"])
        parts |= {name: (weights[name], score_parts[name]) for name in weights}
    return parts


def extract_embeddings(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    scores: dict[str, Tensor],
    rank: int,
    split: str,
    select: str,
) -> dict[str, Any]:
    """The embedding's and the head's entries of `extract`.

    All vocabulary rows are kept, so the window slides over the hidden axis only. A tied teacher has
    one score tensor for both; an untied one gives each its own.
    """
    modules: dict[str, Any] = {}
    score_of = {id(p): scores[name] for name, p in teacher.named_parameters()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        source, target = getattr(teacher, getter)(), getattr(student, getter)()
        name = next(n for n, m in student.named_modules() if m is target)
        rows, cols = target.weight.shape
        if rows != source.weight.shape[0]:
            raise ValueError(f"{name}: vocabulary {source.weight.shape[0]} against {rows}")
        weight = source.weight.detach()
        pick = pick_part(name, weight, score_of[id(source.weight)], (rows, cols), select)
        turned = pick.weight.T if getter == "get_input_embeddings" else pick.weight
        modules[name] = {
            "parts": {name: pick},
            "weight": pick.weight,
            "factors": factors(turned, rank, split),
        }
    return modules
