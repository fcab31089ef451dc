"""Opening a model: alias | folder | hub id → configuration, checkpoint, tokenizer.

No weight is read and torch is not loaded: families, shapes and the reasons why a model cannot
be used all come from `config.json` and the safetensors headers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.checkpoint import (
    EMBEDDINGS,
    FLOAT_DTYPES,
    HEADS,
    Checkpoint,
    Piece,
    first_of,
    open_checkpoint,
)
from pkt.config import SMALL_LAYER
from pkt.errors import CheckpointError, IncompatibleError, UsageError
from pkt.jsonfile import read_object, require_regular, shown

_ENCODERS = {"bert", "roberta", "t5", "electra"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: What pkt computes with, where it is given.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip
_LARGEST_COUNT = 10**12
_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder whose headers are known: nothing of its weights is in memory."""

    name: str  #: as the user gave it: alias, hub id or folder
    source: str  #: what the alias stood for
    folder: Path
    config: Mapping[str, Any]  #: config.json as it is
    config_sha256: str
    checkpoint: Checkpoint

    @property
    def family(self) -> str:
        """transformers' model type, e.g. "llama"."""
        return str(self.config.get("model_type"))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.checkpoint.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.embedding.shape[1]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(_get(self.config, "num_attention_heads", "n_head"))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Rows a head of q, k and v."""
        return int(self.config.get("head_dim") or self.hidden_size // self.heads)

    @property
    def small(self) -> bool:
        """Whether its layers are tiny: by their size alone, so that results are the same."""
        layers = self.checkpoint.layers
        return max(sum(p.elements for p in layer.values()) for layer in layers) < SMALL_LAYER

    @property
    def positions(self) -> int | None:
        """Most tokens the model can take, if its configuration says."""
        found = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return int(found) if found else None

    @property
    def embedding(self) -> Piece:
        """The input embedding, shape (vocabulary, hidden)."""
        name = first_of(self.checkpoint.outer, EMBEDDINGS)
        if name is None:
            name = first_of(self.checkpoint.outer, HEADS)
        if name is None:
            raise IncompatibleError(
                f"{self.folder}: '{self.family}' has no input embedding that pkt knows",
                "known names: embed_tokens, embed_in, wte, word_embeddings",
            )
        return self.checkpoint.outer[name]

    @property
    def head(self) -> Piece | None:
        """The output head; ``None`` where the checkpoint holds only the embedding."""
        name = first_of(self.checkpoint.outer, HEADS)
        return self.checkpoint.outer[name] if name else None

    def hashes(self) -> dict[str, Any]:
        """What the manifest says of this model: no paths."""
        return {
            "family": self.family,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "config_sha256": self.config_sha256,
            "headers_sha256": self.checkpoint.sha256,
        }


def resolve(name: str, aliases: Mapping[str, str]) -> str:
    """What ``name`` stands for: an existing folder, else an alias' entry, else itself."""
    if Path(name).is_dir():
        return name
    return os.path.expanduser(aliases.get(name, name))


def open_model(name: str, aliases: Mapping[str, str], role: str = "model") -> Model:
    """Open a model for reading.

    Args:
        name: alias, folder or hub id.
        aliases: table of aliases (`pkt.config.load_aliases`).
        role: "teacher" or "student", for messages.

    Raises:
        UsageError: no such folder, and the hub cannot give it.
        CheckpointError: damaged or pickled checkpoint, unreadable configuration.
        IncompatibleError: not a dense decoder-only model in plain weights.

    """
    source = resolve(name, aliases)
    folder = Path(source) if Path(source).is_dir() else _from_hub(source, name, role)
    config_path = folder / "config.json"
    try:
        config = read_object(config_path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: expected a model folder, found no config.json",
            "give the folder that save_pretrained() wrote or the hub downloaded",
        ) from error
    _check_kinds(config, config_path)
    if isinstance(config.get("text_config"), dict):
        raise IncompatibleError(
            f"{role} {folder}: '{config.get('model_type')}' holds more than a text decoder",
            "save its language model alone, for example with AutoModelForCausalLM",
        )
    refuse_unsupported(config, folder, role)
    _check_counts(config, config_path, _COUNTS, least=1)
    layers = _get(config, *_DEPTHS)
    if not any(name in config for name in _DEPTHS):
        raise IncompatibleError(
            f"{role} {folder}: '{config.get('model_type')}' does not say how many layers it has: "
            f"expected {' or '.join(_DEPTHS)} in config.json",
            "pkt works on …ForCausalLM models whose layers are numbered in one list",
        )
    if not isinstance(layers, int) or layers < 1:
        raise CheckpointError(f"{config_path}: num_hidden_layers: expected ≥ 1, found {layers!r}")
    checkpoint = open_checkpoint(folder, layers)
    if any(".experts." in f".{suffix}." for suffix in checkpoint.layers[0]):
        raise _mixture(config, folder, role)
    if not _get(config, "num_attention_heads", "n_head"):
        raise IncompatibleError(
            f"{role} {folder}: '{config['model_type']}' names no attention heads; "
            "expected a transformer decoder",
            "pkt works on …ForCausalLM models",
        )
    digest = hashlib.sha256(_canonical(config)).hexdigest()
    model = Model(name, source, folder, config, digest, checkpoint)
    for end in (model.embedding, model.head):  # refused here rather than later
        if end and not _is_matrix(end):
            raise CheckpointError(
                f"tensor '{end.name}' in {checkpoint.shard_name(end)}: expected a matrix of "
                f"floating-point numbers, found {end.dtype} {list(end.shape)}"
            )
    if not any(map(_is_matrix, checkpoint.layers[0].values())):
        raise IncompatibleError(
            f"{role} {folder}: its layers hold no linear weight of floating-point numbers",
            "pkt works on …ForCausalLM models in plain weights",
        )
    return model


def refuse_unsupported(config: Mapping[str, Any], folder: Path, role: str) -> None:
    """Raise `IncompatibleError` for encoders, mixtures of experts and quantized weights."""
    family = config.get("model_type")
    architectures = config.get("architectures") or []
    causal = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    encoder = config.get("is_encoder_decoder") or str(family) in _ENCODERS
    if encoder or (architectures and not causal):
        kind = ", ".join(map(str, architectures)) or family
        raise IncompatibleError(
            f"{role} {folder}: expected a decoder-only language model, found {kind}",
            "pkt works on …ForCausalLM models",
        )
    if not family:
        raise IncompatibleError(f"{role} {folder}: config.json names no model_type")
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        method = named or "unknown method"
        raise IncompatibleError(
            f"{role} {folder}: its weights are quantized ({method}); expected plain weights",
            "use the unquantized checkpoint: gradients of packed integers do not exist",
        )
    if any((config.get(key) or 0) > 1 for key in _EXPERTS):
        raise _mixture(config, folder, role)


def vocabulary(model: Model) -> Mapping[str, int] | None:
    """Token → id as tokenizer.json says; ``None`` if there is none. Nothing is loaded for it."""
    try:
        loaded = read_object(model.folder / "tokenizer.json", _TOKENIZER_BYTES)
        listed = loaded["model"]["vocab"]
        added = {token["content"]: token["id"] for token in loaded.get("added_tokens", [])}
    except (OSError, CheckpointError, KeyError, TypeError):
        return None
    if isinstance(listed, list):  # unigram: pairs of piece and score
        listed = {piece[0]: index for index, piece in enumerate(listed)}
    return {**listed, **added}


def vocabulary_sha256(model: Model) -> str | None:
    """SHA-256 over (token, id) in the order of the ids; ``None`` where `vocabulary` is."""
    found = vocabulary(model)
    if found is None:
        return None
    pairs = sorted(found.items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: the folder holds none, or it cannot be loaded.

    """
    from transformers import AutoTokenizer

    for path in sorted(model.folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            require_regular(path)
    try:
        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if not _is_usable(model.folder):  # the tokenizer's class is looked up by the configuration
            raise IncompatibleError(
                f"{model.folder}: transformers cannot build this model: {reason}"
            ) from error
        raise CheckpointError(
            f"{model.folder}: its tokenizer cannot be loaded: {reason}",
            "copy the tokenizer files (tokenizer.json, tokenizer_config.json) beside the model",
        ) from error


def _is_usable(folder: Path) -> bool:
    """Whether transformers makes something of config.json."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        return False
    return True


def _from_hub(source: str, name: str, role: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    meaning = f" (alias '{name}')" if source != name else ""
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise UsageError(f"{role} '{source}'{meaning}: no such folder")
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{role} '{source}'{meaning}: neither a folder nor a hub id") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{role} '{source}'{meaning}: no such folder, and the hub did not give it: {reason}",
            "download it first, or write 'alias: /folder' into the alias table (`pkt env`)",
        ) from error


def _mixture(config: Mapping[str, Any], folder: Path, role: str) -> IncompatibleError:
    return IncompatibleError(
        f"{role} {folder}: '{config.get('model_type')}' is a mixture of experts; "
        "expected a dense model",
        "experts are not seen by every seed: pkt refuses them until their scores mean something",
    )


def _check_kinds(config: Mapping[str, Any], path: Path) -> None:
    """What decides whether a model is supported is of the kind that the decision expects."""
    for key, kind, words in (("model_type", str, "a text"), ("architectures", list, "a list")):
        if not isinstance(config.get(key), kind | None):
            raise CheckpointError(f"{path}: {key}: expected {words}, found {shown(config[key])}")
    _check_counts(config, path, _EXPERTS, least=0)


def _check_counts(
    config: Mapping[str, Any], path: Path, keys: Sequence[str], *, least: int
) -> None:
    for key in keys:
        value = config.get(key)
        if value is not None and not (type(value) is int and least <= value <= _LARGEST_COUNT):
            raise CheckpointError(
                f"{path}: {key}: expected a whole number from {least} to {_LARGEST_COUNT}, "
                f"found {shown(value)}"
            )


def _is_matrix(piece: Piece) -> bool:
    return len(piece.shape) == 2 and piece.elements > 0 and piece.dtype in FLOAT_DTYPES


def _get(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), 0)


def _canonical(config: Mapping[str, Any]) -> bytes:
    """Config bytes without what a copy of the folder changes."""
    kept = {k: v for k, v in config.items() if k not in {"_name_or_path", "transformers_version"}}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
