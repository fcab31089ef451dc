"""Tiny random checkpoints and seeds for them, made in milliseconds and offline.

Every parameter is random and none is left at a value that hides a mistake: norm weights lie around
1 ± 0.3 (Gemma, whose norms multiply by 1 + w: around 0 ± 0.3), biases are not zero, queries and
keys are large enough that attention is far from uniform, and the soft caps bite. Layer QUIET adds
little to the residual stream, so that the most sensitive layers are not the first ones. Windows of
sliding attention hold `WINDOW` tokens and `random_seeds` makes longer ones by default. Token ids 0
to 3 are pad, BOS, EOS and unk, as in `write_tokenizer` (of tiny_tokenizer.py, offered here too).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny_tokenizer import CHATML, CHATML_MARKED, SPECIALS, write_tokenizer

__all__ = [
    "CHATML",
    "CHATML_MARKED",
    "FAMILIES",
    "QUIET",
    "SIZES",
    "SPECIALS",
    "WINDOW",
    "build",
    "random_seeds",
    "randomize",
    "stored_names",
    "write_tokenizer",
]

WINDOW = 4
QUIET = 1

# Per size: layers, hidden, heads, key-value heads, MLP width.
SIZES = {"teacher": (4, 48, 6, 3, 80), "student": (3, 32, 4, 2, 56)}
# Per family: the model type and what it adds to the config. "pattern" alternates sliding and full
# attention, sliding first; the other keys go to the config as they are.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": WINDOW,
            "pattern": True,
            "pad_token_id": 0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "pattern": True,
            "pad_token_id": 0,
        },
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW, "pad_token_id": 0}),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "pattern": True, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
}


def build(
    family: str,
    folder: Path,
    size: str = "teacher",
    *,
    tied: bool | None = None,
    shards: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = 96,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    **overrides: object,
) -> Path:
    """Write a random checkpoint of `family` (a key of FAMILIES) and return its folder.

    Args:
        family: a key of FAMILIES.
        folder: created where it does not exist.
        size: "teacher" or "student"; `layers` to `intermediate` replace single numbers of it.
        tied: whether head and embedding are one tensor; None is the family's own default.
        shards: split so that no shard exceeds 1/shards of the bytes: at least about that many.
        dtype: dtype of the stored tensors; drawn in float64 and rounded once.
        seed: of the parameters; equal arguments give equal files.
        vocab: vocabulary rows.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads (GPT-NeoX has none of its own).
        intermediate: MLP width.
        overrides: further config entries, after the family's own; `pattern=False` drops that.

    """
    model_type, extra = FAMILIES[family]
    base = SIZES[size]
    asked = (layers, hidden, heads, kv_heads, intermediate)
    n_layers, width, n_heads, n_kv, mlp = (a or b for a, b in zip(asked, base, strict=True))
    entries: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "gpt_neox":
        entries["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    else:
        entries["num_key_value_heads"] = n_kv
    if tied is not None:
        entries["tie_word_embeddings"] = tied
    entries |= extra | overrides
    if entries.pop("pattern", False):
        kinds = ("sliding_attention", "full_attention")
        entries.setdefault("layer_types", [kinds[i % 2] for i in range(n_layers)])
    config = AutoConfig.for_model(model_type, **entries)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    randomize(model, seed)
    model.to(dtype)
    model.config.dtype = dtype
    limit = "5GB"
    if shards:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        limit = str(math.ceil(total / shards))
    model.save_pretrained(folder, max_shard_size=int(limit) if shards else limit)
    return Path(folder)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew, in the order of their names, from one generator on `seed`.

    Linear weights have standard deviation gain / sqrt(in), gain 1.5 for whatever makes queries and
    keys and 1 for the rest; embeddings 0.5; a head of its own 3 / sqrt(hidden). In layer QUIET the
    projections back to the residual stream and the norms named post_… are a fifth of that.
    """
    gemma = model.config.model_type.startswith("gemma")
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        writers = ("o_proj", "down_proj", "dense.", "dense_4h_to_h", ".post_")
        scale = 0.2 if f"layers.{QUIET}." in name and any(w in name for w in writers) else 1.0
        if name.endswith(".bias"):
            value = 0.3 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.3 * noise
        elif "embed" in name:
            value = 0.5 * noise
        elif name == "lm_head.weight":
            value = 3.0 * noise / math.sqrt(parameter.shape[1])
        else:
            keys = ("q_proj", "k_proj", "qkv_proj", "query_key_value")
            gain = 1.5 if any(key in name for key in keys) else 1.0
            value = gain * noise / math.sqrt(parameter.shape[1])
        value = scale * value
        parameter.copy_(value - 1 if gemma and parameter.ndim == 1 else value)


def random_seeds(
    vocab: int,
    count: int,
    length_range: tuple[int, int] = (2 * WINDOW + 1, 4 * WINDOW),
    seed: int = 0,
) -> list[tuple[list[int], list[bool]]]:
    """Return `count` pairs (token ids, loss mask): a masked prompt, then an answer that counts.

    Lengths are uniform in `length_range` (both ends included, at least 2), ids in [0, vocab): the
    pad id occurs, which a padding_idx gives a zero embedding gradient. The prompt has 1 to half of
    the tokens; mask[i] says that token i is predicted, so mask[0] is always False.
    """
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    seeds = []
    for _ in range(count):
        length = integer(*length_range)
        prompt = integer(1, length // 2)
        ids = torch.randint(0, vocab, (length,), generator=draw).tolist()
        seeds.append((ids, [i >= prompt for i in range(length)]))
    return seeds


def stored_names(folder: Path) -> dict[str, str]:
    """Return tensor name → file name, as the index says or, with one file, as its header says."""
    index = Path(folder) / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    raw = (Path(folder) / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: "model.safetensors" for name in header if name != "__metadata__"}
