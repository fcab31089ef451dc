"""Reading a LoRA folder, whoever wrote it: factors in float32, their scaling folded into B.

PEFT adds ``s · BA`` with s = alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732), where
``rank_pattern`` and ``alpha_pattern`` may give a module its own r and alpha. Read here, every
product is BA. What is not a plain LoRA is refused: weights of another form would be lost.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.errors import CheckpointError, IncompatibleError
from pkt.jsonfile import read_object, require_regular, shown
from pkt.records import LowRank

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<half>[AB])\.weight|embedding_(?P<end>[AB]))"
)
_STORED = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight")
_BEYOND = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "biases (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
#: Initialisations that leave the base as it is; the others subtract their start from it.
_PURE = (True, False, None, "gaussian", "eva", "orthogonal")
MAX_NUMBER = 1e30  # of a rank or an alpha
MAX_MANIFEST_BYTES = 256 << 20  # lists of rows and columns of every matrix are in it


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA as its folder has it."""

    folder: Path
    base_model: str | None  #: ``base_model_name_or_path``
    factors: Mapping[str, LowRank]  #: by full module name, scaling 1
    embeddings: frozenset[str]  #: modules of them that are stored as embeddings, transposed
    stored: Mapping[str, str]  #: base weights that PEFT saved along: module → key
    manifest: Mapping[str, Any] | None  #: pkt_manifest.json, where pkt wrote the folder
    sha256: str  #: over both files

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(int(half.a.shape[0]) for half in self.factors.values())


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA folder.

    Raises:
        CheckpointError: files are missing, damaged, contradict each other or are not finite.
        IncompatibleError: an adapter that is more or other than LoRA factors.

    """
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    config, raw = _config(folder)
    _refuse(config, folder)
    digest = hashlib.sha256(raw)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    embeddings, stored = set(), {}
    require_regular(path)
    try:
        with path.open("rb") as whole:
            while block := whole.read(1 << 22):
                digest.update(block)
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                if found := _KEY.fullmatch(key):
                    tensor = file.get_tensor(key)
                    if tensor.ndim != 2 or not tensor.isfinite().all():
                        raise CheckpointError(f"{path}: tensor '{key}' is no finite LoRA factor")
                    half = found["half"] or found["end"]
                    halves.setdefault(found["module"], {})[half] = tensor.float()
                    if found["end"]:
                        embeddings.add(found["module"])
                elif found := _STORED.fullmatch(key):
                    stored[found["module"]] = key
                else:
                    kind = "DoRA" if "magnitude" in key else "it is no LoRA factor"
                    raise IncompatibleError(
                        f"{path}: tensor '{key}': {kind}; expected lora_A and lora_B alone"
                    )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: expected a LoRA folder, found no {path.name}",
            "save it with save_pretrained(), in safetensors",
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not halves:
        raise CheckpointError(f"{path}: expected LoRA factors, found none")
    factors = {name: _scaled(name, half, config, path) for name, half in sorted(halves.items())}
    base = config.get("base_model_name_or_path")
    return Adapter(
        folder, str(base) if base else None, factors, frozenset(embeddings), stored,
        _manifest(folder), digest.hexdigest(),
    )  # fmt: skip


def read_factors(folder: Path) -> dict[str, LowRank]:
    """The factors of a LoRA folder in float32, scaling folded into B, by full module name."""
    return dict(read_adapter(folder).factors)


def _config(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / "adapter_config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder}: expected a LoRA folder, found no {path.name}",
            "give the folder that pkt train, pkt extract or PEFT's save_pretrained() wrote",
        )
    return read_object(path), path.read_bytes()


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise IncompatibleError(f"{folder}: expected a LoRA adapter, found {kind}")
    beyond = [what for key, what in _BEYOND.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"biases (bias: {config['bias']})")
    if beyond:
        raise IncompatibleError(
            f"{folder}: expected a plain LoRA, found {', '.join(beyond)}",
            "such weights are no product BA beside a matrix; train without, or merge with PEFT",
        )
    start = config.get("init_lora_weights")
    if start not in _PURE:
        raise IncompatibleError(
            f"{folder}: init_lora_weights is '{start}': it belongs to a base that this start was "
            "subtracted from",
            "save it again with path_initial_model_for_weight_conversion, as PEFT describes",
        )


def _scaled(
    name: str, half: Mapping[str, torch.Tensor], config: Mapping[str, Any], path: Path
) -> LowRank:
    """The factors of one module, s folded into B."""
    from peft.utils.other import get_pattern_key

    if half.keys() != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1]:
        raise CheckpointError(f"{path}: module '{name}' lacks a factor, or its ranks differ")
    where = f"{path.parent / 'adapter_config.json'}"
    values: list[float] = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                f"{where}: {pattern}: expected an object, found {shown(patterns)}"
            )
        try:
            value = patterns.get(get_pattern_key(list(patterns), name), config.get(key))
        except re.error as error:
            raise CheckpointError(f"{where}: {pattern}: expected patterns: {error}") from error
        if not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:  # nor NaN
            raise CheckpointError(
                f"{where}: {key} of '{name}': expected a number, found {shown(value)}"
            )
        values.append(value)
    rank, alpha = values
    held = half["A"].shape[0]
    if rank != held or not held:
        raise CheckpointError(
            f"{path}: module '{name}': expected rank {rank}, as adapter_config.json has it, and 1 "
            f"at least, found {held}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    b = half["B"] if scale == 1 else half["B"] * scale
    if not b.isfinite().all():
        raise CheckpointError(
            f"{where}: lora_alpha of '{name}' makes its B infinite: {shown(alpha)}"
        )
    return LowRank(b, half["A"])


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "pkt_manifest.json"
    try:
        return read_object(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
