"""Writing a LoRA folder in PEFT's format, whole and checked against the student it is for.

Every weight is float32 and alpha equals the rank, so scaling is 1. Names, ranks and shapes are
PEFT's (`lora_A` r × in, `lora_B` out × r; embeddings `lora_embedding_A` r × vocabulary and
`lora_embedding_B` hidden × r, without ".weight").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkt import _core
from pkt.errors import PktError
from pkt.records import Factors, LowRank


def adapter_config(
    factors: Mapping[str, Factors | LowRank], rank: int, base_model: str, every_layer: bool
) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA over the modules named in ``factors``.

    Args:
        factors: by full module name; a module of smaller rank gets a pattern entry.
        rank: r, and alpha.
        base_model: what PEFT notes as ``base_model_name_or_path``.
        every_layer: whether leaf names ("q_proj") denote exactly these modules.

    """
    from peft import LoraConfig

    smaller = {n: f.a.shape[0] for n, f in factors.items() if f.a.shape[0] != rank}
    names = {_leaf(name) for name in factors} if every_layer else set(factors)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=sorted(names),
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        init_lora_weights=True,
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}


def adapter_tensors(
    factors: Mapping[str, Factors | LowRank], embedding: str | None
) -> dict[str, torch.Tensor]:
    """PEFT's names and tensors; ``embedding`` is the module stored the other way round.

    An embedding weight is (V, D) and PEFT adds ``(B @ A).T`` to it: its factors are those of
    the transposed window, B (D, r) and A (r, V).
    """
    tensors = {}
    for name, pair in factors.items():
        kind, ending = ("embedding_", "") if name == embedding else ("", ".weight")
        tensors[f"base_model.model.{name}.lora_{kind}A{ending}"] = pair.a
        tensors[f"base_model.model.{name}.lora_{kind}B{ending}"] = pair.b
    return tensors


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write both files of the adapter into ``folder``, which must exist.

    Tensor by tensor: the adapter of a high rank is held once.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    ordered = {name: tensors[name] for name in sorted(tensors)}
    specs = [(name, "F32", list(tensor.shape)) for name, tensor in ordered.items()]
    writer = _core.Writer(str(folder / "adapter_model.safetensors"), specs)
    try:
        for name, tensor in ordered.items():
            writer.write(name, tensor.float().contiguous().view(torch.uint8).flatten().numpy())
        writer.finish()
    finally:
        writer.close()


def write_factors(
    folder: Path,
    factors: Mapping[str, LowRank],
    modules: Mapping[str, torch.nn.Module],
    base_model: str,
) -> int:
    """Write both files of an adapter over ``factors`` into ``folder``.

    Args:
        folder: existing.
        factors: by full module name.
        modules: of the student, by full name.
        base_model: what PEFT notes as ``base_model_name_or_path``.

    Returns:
        its rank, the largest of the factors'.

    """
    rank = max(int(half.a.shape[0]) for half in factors.values())
    leaves = {_leaf(name) for name in factors}
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    meant = {n for n, m in modules.items() if _leaf(n) in leaves and isinstance(m, kinds)}
    embedding = next((n for n in factors if isinstance(modules[n], torch.nn.Embedding)), None)
    config = adapter_config(factors, rank, base_model, every_layer=meant == set(factors))
    write_adapter(folder, config, adapter_tensors(factors, embedding))
    return rank


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def check_adapter(folder: Path, student: Path) -> None:
    """Load the adapter onto the student's meta skeleton, as PEFT would.

    Raises:
        PktError: a key is missing or unexpected, or a module name matches nothing.

    """
    import warnings

    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LoraConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about training settings: nothing is trained here
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
        base.tie_weights()
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
        state = load_file(folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        key = (missing or result.unexpected_keys)[0]
        kind = "missing" if missing else "unexpected"
        raise PktError(f"{folder}: the adapter does not load on the student: {kind} key '{key}'")
