"""What belongs to a model beside its weights: configuration, tokenizer, chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkt.errors import CheckpointError
from pkt.merging.layout import INDEX

_CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
    ".onnx_data", ".ot", ".npz", ".pkl", ".zip", ".tar", ".gz", ".part",
})  # fmt: skip
_NOT_COPIED = frozenset({"README.md", "adapter_config.json", "config.json", INDEX})
_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer


def copy_rest(source: Path, folder: Path, config: Mapping[str, Any] | None) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, generation, chat templates.

    Args:
        source: the model's folder.
        folder: existing.
        config: the new config.json; ``None`` copies the old one byte for byte.

    Raises:
        CheckpointError: of `rest_of`.

    """
    for path in rest_of(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if config is None:
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def rest_of(source: Path) -> list[Path]:
    """The files that `copy_rest` copies, less config.json.

    Links are followed no further than those of weights: what is copied may be published.

    Raises:
        CheckpointError: a file is a link out of the model's folder.

    """
    rest = [path for path in sorted(source.iterdir()) if path.is_file() and _is_copied(path.name)]
    rest += sorted(path for path in (source / _TEMPLATES).glob("*") if path.is_file())
    roots = _roots(source)
    for path in rest:
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{path}: expected a file of the model inside its folder, found a link to {real}, "
                "outside",
                "put the file itself there, or remove the link",
            )
    return rest


def new_config(config: Mapping[str, Any], dtype: str | None, untied: bool) -> dict[str, Any] | None:
    """The configuration of the new model; ``None`` if it is the old one."""
    changed: dict[str, Any] = {}
    if dtype:
        key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
        if config.get(key) != _CONFIG_NAMES[dtype]:
            changed[key] = _CONFIG_NAMES[dtype]
    if untied:
        changed["tie_word_embeddings"] = False
    return {**config, **changed} if changed else None


def _roots(source: Path) -> list[Path]:
    """The real folder and, in the cache of the hub, the blobs of the same repository."""
    real = source.resolve()
    repository = real.parent.parent
    cached = real.parent.name == "snapshots" and repository.name.startswith("models--")
    return [real, repository / "blobs"] if cached else [real]


def _is_copied(name: str) -> bool:
    hidden = name.startswith((".", "pkt_"))
    index = name.endswith(".index.json")
    return not (hidden or index or name in _NOT_COPIED or Path(name).suffix.lower() in _WEIGHTS)
