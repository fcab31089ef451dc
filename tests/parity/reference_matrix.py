"""Reference of SEEKING, steps 3 and 4, for the tests: logical parts, selection, factors.

Independent of `pkt`. One matrix at a time, in float64 (integers in int64), a summed-area table for
every window, a full SVD. `reference.py` has steps 1 and 2 and runs all four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

TIE = 1e-12  # float window sums closer than TIE x the sum of all scores count as equal

FUSED = {
    ("phi3", "self_attn.qkv_proj"): ("q_proj", "k_proj", "v_proj"),
    ("phi3", "mlp.gate_up_proj"): ("gate_proj", "up_proj"),
    ("gpt_neox", "attention.query_key_value"): ("q_proj", "k_proj", "v_proj"),
}


class Factors(NamedTuple):
    """Low-rank factors of a weight: b @ a ≈ weight, b (n, r), a (r, m), sigma (r,)."""

    a: Tensor
    b: Tensor
    sigma: Tensor


class Pick(NamedTuple):
    """What one logical part took from the teacher.

    Attributes:
        at: `window` (row, column); `rows-cols` (rows, columns); `top-weights` the flat indices.
            All of them count in the expanded tensor where `repeat` > 1.
        total: sum of the scores picked.
        repeat: how often each kv head of the teacher was repeated first; 1 is not at all.
        scores: the scores picked, (n_S, m_S).
        weight: the weights picked, (n_S, m_S).

    """

    at: Any
    total: float
    repeat: int
    scores: Tensor
    weight: Tensor


def head_counts(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return (query heads, key-value heads, head_dim) of a config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def expand_kv(weight_or_scores: Tensor, head_dim: int, repeat: int, share: bool) -> Tensor:
    """Repeat each kv head `repeat` times: rows (kv·head_dim) become rows (kv·repeat·head_dim).

    Row block h of the result is kv head h // repeat, as transformers' `repeat_kv` has it. With
    `share` (scores) the values are divided by `repeat`, so that their total stays.
    """
    rows, columns = weight_or_scores.shape
    per_head = weight_or_scores.reshape(rows // head_dim, head_dim, columns)
    result = per_head.repeat_interleave(repeat, dim=0).reshape(rows * repeat, columns)
    return result / repeat if share else result


def split_fused(
    model_type: str, config: PreTrainedConfig, suffix: str, tensor: Tensor
) -> dict[str, Tensor]:
    """Split a weight (or its scores) into logical parts, by name, in the order they are stored.

    Phi-3 stacks rows q | k | v and gate | up. GPT-NeoX stores rows (heads, 3, head_dim): the parts
    are q, k, v of all heads, each (heads·head_dim, in). Every other module is its own only part.
    """
    if (model_type, suffix) not in FUSED:
        return {suffix: tensor}
    stem = suffix.rpartition(".")[0]
    names = [f"{stem}.{part}" for part in FUSED[model_type, suffix]]
    heads, kv_heads, head_dim = head_counts(config)
    if model_type == "gpt_neox":
        stored = tensor.reshape(heads, 3, head_dim, tensor.shape[1])
        pieces = [stored[:, i].reshape(heads * head_dim, -1) for i in range(3)]
    elif suffix.endswith("qkv_proj"):
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        pieces = list(tensor.split(sizes))
    else:
        pieces = list(tensor.chunk(2))
    return dict(zip(names, pieces, strict=True))


def stack_fused(
    model_type: str, config: PreTrainedConfig, suffix: str, parts: dict[str, Tensor]
) -> Tensor:
    """Inverse of `split_fused`: the parts, in that order, stacked as the module stores them."""
    if model_type == "gpt_neox" and (model_type, suffix) in FUSED:
        heads, _, head_dim = head_counts(config)
        by_head = [p.reshape(heads, head_dim, -1) for p in parts.values()]
        return torch.stack(by_head, dim=1).reshape(3 * heads * head_dim, -1)
    return torch.cat(list(parts.values()))


def window_sums(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Sums of every rows x columns window, by its top left corner, from a summed-area table.

    Floats are summed in float64, integers in int64 (exact while the total stays below 2^63).
    """
    n, m = scores.shape
    if rows > n or columns > m:
        raise ValueError(f"a window of {(rows, columns)} does not fit into {(n, m)}")
    dtype = torch.float64 if scores.is_floating_point() else torch.int64
    table = torch.zeros(n + 1, m + 1, dtype=dtype)
    table[1:, 1:] = scores.to(dtype).cumsum(0).cumsum(1)
    return (
        table[rows:, columns:]
        - table[:-rows, columns:]
        - table[rows:, :-columns]
        + table[:-rows, :-columns]
    )


def best_window(scores_2d: Tensor, rows: int, cols: int) -> tuple[int, int, float]:
    """Return (row, column, sum) of the contiguous window of largest sum.

    Ties: smallest row, then smallest column. Sums of integers tie when equal, sums of floats when
    closer than TIE times the total.
    """
    sums = window_sums(scores_2d, rows, cols)
    slack = TIE * scores_2d.double().abs().sum() if scores_2d.is_floating_point() else 0
    row, column = (sums >= sums.max() - slack).nonzero()[0].tolist()  # nonzero is row-major
    return row, column, sums[row, column].item()


def window_gap(scores_2d: Tensor, rows: int, cols: int) -> float:
    """How far the runner-up lies below the best window, relative to the best; inf if alone.

    An implementation whose scores are off by less than half of this must find the same window.
    """
    sums = window_sums(scores_2d, rows, cols).double().flatten()
    if len(sums) == 1:
        return float("inf")
    first, second = sums.topk(2).values.tolist()
    return (first - second) / first if first else 0.0


def window_sum(scores_2d: Tensor, row: int, column: int, rows: int, cols: int) -> float:
    """Sum of the one window whose top left corner is (row, column), in float64."""
    return float(scores_2d[row : row + rows, column : column + cols].double().sum())


def highest(values: Tensor, k: int) -> Tensor:
    """Indices of the k highest values, ascending; of equal ones the lower index wins."""
    return values.argsort(descending=True, stable=True)[:k].sort().values


def rows_cols(scores: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """The rows and the columns of largest summed score, each over the whole matrix, ascending."""
    s = scores.double()
    return highest(s.sum(1), rows), highest(s.sum(0), cols)


def top_weights(scores: Tensor, rows: int, cols: int) -> Tensor:
    """Flat indices of the rows·cols entries of largest score, in row-major order."""
    return highest(scores.double().flatten(), rows * cols)


def pick_part(
    name: str, weight: Tensor, scores: Tensor, shape: tuple[int, int], select: str, repeat: int = 1
) -> Pick:
    """Select `shape` entries of one logical part; where it does not fit, ValueError names it."""
    rows, cols = shape
    if rows > weight.shape[0] or cols > weight.shape[1]:
        raise ValueError(f"{name}: teacher {tuple(weight.shape)}, student {shape}")
    at: Any
    take: Callable[[Tensor], Tensor]
    if select == "window":
        row, column, _ = best_window(scores, rows, cols)
        at = (row, column)
        take = lambda t: t[row : row + rows, column : column + cols]  # noqa: E731
    elif select == "rows-cols":
        at = rows_cols(scores, rows, cols)
        take = lambda t: t[at[0]][:, at[1]]  # noqa: E731
    elif select == "top-weights":
        at = top_weights(scores, rows, cols)
        take = lambda t: t.flatten()[at].reshape(rows, cols)  # noqa: E731
    else:
        raise ValueError(f"unknown selection {select!r}")
    return Pick(at, float(take(scores).double().sum()), repeat, take(scores), take(weight))


def factors(window: Tensor, rank: int, split: str = "paper") -> Factors:
    """Truncated SVD of the window, W = UΣVᵀ, at rank r = min(rank, n, m).

    "paper": B = U_r Σ_r, A = V_rᵀ; "balanced": B = U_r √Σ_r, A = √Σ_r V_rᵀ. In each column of U
    the entry of largest magnitude is positive (the first of equal ones, equal to within 1e-9).
    """
    if split not in ("paper", "balanced"):
        raise ValueError(f"unknown split {split!r}")
    u, sigma, vh = torch.linalg.svd(window.double(), full_matrices=False)
    r = min(rank, *window.shape)
    u, sigma, vh = u[:, :r], sigma[:r], vh[:r]
    largest = u.abs() >= u.abs().amax(0) * (1 - 1e-9)
    lead = u.gather(0, largest.to(torch.uint8).argmax(0, keepdim=True))[0]  # the first of them
    sign = torch.where(lead < 0, -1.0, 1.0).to(u)
    u, vh = u * sign, vh * sign[:, None]
    root = sigma.sqrt()
    if split == "balanced":
        return Factors(a=root[:, None] * vh, b=u * root, sigma=sigma)
    return Factors(a=vh, b=u * sigma, sigma=sigma)
