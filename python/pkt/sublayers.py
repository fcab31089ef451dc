"""Where in a transformers model the parts of a decoder layer are, whatever its family calls them.

A decoder layer adds to the residual stream what its attention and what its MLP say; some families
(Gemma 2 and later, OLMo 2) pass either through a norm of its own before they add it, and Granite
multiplies it. `contribution` names the module whose output is added. That the two do add up to what
the layer adds is for the caller to check, on the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pkt.errors import IncompatibleError

INTERFACES = ("mlp", "attn", "block", "hidden")
"""Places of a layer: what its MLP or attention adds, what both add, what it hands on."""

_MODULES: dict[str, tuple[str, ...]] = {
    "attn": ("self_attn", "attention", "attn", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "fc2"),
}
_OWN_NORMS: dict[str, tuple[str, ...]] = {
    "attn": ("post_self_attn_layernorm", "post_attention_layernorm"),
    "mlp": ("post_mlp_layernorm", "post_feedforward_layernorm"),
}


def decoder_layers(model: Any) -> Sequence[Any]:
    """The decoder layers of a transformers causal model, or of one wrapped by PEFT, in order.

    Raises:
        IncompatibleError: they are not in one ModuleList.

    """
    from torch import nn

    config = model.config.get_text_config()
    count = int(config.num_hidden_layers)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [n for n in stacks if not any(n.startswith(f"{other}.") for other in stacks)]
    if len(outer) != 1:
        raise IncompatibleError(
            f"model family '{config.model_type}': expected its {count} decoder layers in one "
            f"ModuleList, found {len(outer)} such lists"
        )
    return list(stacks[outer[0]])


def contribution(layer: Any, interface: str, family: str) -> tuple[Any, float]:
    """The module whose output ``mlp`` or ``attn`` adds to the residual stream, and its factor.

    A norm that follows the sub-layer counts as part of it. ``post_attention_layernorm`` is such a
    norm only where the MLP has one of its own too; in Llama it comes before the MLP.

    Raises:
        IncompatibleError: the layer has no module of a known name.

    """
    parts = dict(layer.named_children())
    factor = float(getattr(layer, "residual_multiplier", 1.0))
    own = any(name in parts for name in _OWN_NORMS["mlp"])
    names = (_OWN_NORMS if own else _MODULES)[interface]
    for name in names:
        if name in parts:
            return parts[name], factor
    raise IncompatibleError(
        f"model family '{family}': expected a module {' or '.join(names)} in its decoder layer, "
        f"found {', '.join(parts)}",
        "take --interface block or hidden",
    )
