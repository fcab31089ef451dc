"""The models of one table: a student, its adapters, a teacher; checked before a weight is read."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.errors import CheckpointError, IncompatibleError, UsageError
from pkt.evaluation.quiet import silence
from pkt.models import Model

STUDENT, TEACHER = "student", "teacher"
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt"})  #: families that store (in, out)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: PEFT types that put tokens before the text instead of changing the model's modules.
_PROMPTS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder that fits the student."""

    label: str  #: its column: the folder's name, made unique
    folder: Path
    sha256: str  #: over configuration and weights
    changes_base: bool  #: it replaces or alters modules of its base: unloading does not undo that


def open_adapters(folders: Sequence[Path], student: Model) -> list[Adapter]:
    """Check each folder against the student's headers and give it a label.

    Raises:
        UsageError: no such folder, or no adapter in it.
        CheckpointError: damaged or pickled.
        IncompatibleError: an extracted start, an adapter of another student, or of a kind that
            works on prompts.

    """
    labels: set[str] = {STUDENT, TEACHER}
    found = []
    for folder in folders:
        config = _config(folder)
        _refuse_start(folder)
        kind = str(config.get("peft_type"))
        if kind in _PROMPTS:
            raise IncompatibleError(
                f"{folder}: expected an adapter of the model's weights, found {kind}",
                "pkt eval takes LoRA and the like, not learned prompts",
            )
        shapes, digest = _weights(folder)
        _check_shapes(folder, shapes, student)
        label, number = folder.resolve().name, 1
        while label in labels:
            number += 1
            label = f"{folder.resolve().name}-{number}"
        labels.add(label)
        plain = kind == "LORA" and config.get("bias", "none") == "none"
        extra = config.get("modules_to_save") or config.get("trainable_token_indices")
        found.append(Adapter(label, folder, digest, not plain or bool(extra)))
    return found


class Models:
    """Student and teacher, each loaded at most once while it is needed.

    Args:
        student: opened.
        teacher: opened, or ``None``.
        dtypes: by model folder, what it is computed in.
        device: of both.

    """

    def __init__(
        self, student: Model, teacher: Model | None, dtypes: dict[Path, torch.dtype], device: str
    ) -> None:
        self._student, self._teacher = student, teacher
        self._dtypes, self._device = dtypes, device
        self._loaded: dict[str, Any] = {}

    def teacher(self) -> Any:
        """The teacher, whole."""
        assert self._teacher is not None
        return self._load(TEACHER, self._teacher)

    @contextmanager
    def student(self, adapter: Adapter | None = None) -> Iterator[Any]:
        """The student, with one adapter on it while the block runs."""
        base = self._load(STUDENT, self._student)
        if adapter is None:
            yield base
            return
        model = _attach(base, adapter)
        try:
            yield model
        finally:
            if adapter.changes_base:
                del self._loaded[STUDENT], base, model
                gc.collect()
            else:
                self._loaded[STUDENT] = model.unload()

    def close(self) -> None:
        """Forget both."""
        self._loaded.clear()
        gc.collect()

    def _load(self, role: str, model: Model) -> Any:
        if role not in self._loaded:
            from transformers import AutoModelForCausalLM

            try:
                with silence():  # it draws a bar of its own
                    loaded = AutoModelForCausalLM.from_pretrained(
                        model.folder, dtype=self._dtypes[model.folder], trust_remote_code=False
                    )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                message = f"{model.folder}: transformers cannot load this model: {reason}"
                raise CheckpointError(message) from error
            self._loaded[role] = loaded.to(self._device).eval().requires_grad_(False)
        return self._loaded[role]


def _attach(base: Any, adapter: Adapter) -> Any:
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(adapter.folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise IncompatibleError(
            f"{adapter.folder}: the adapter does not load on this student: {reason}",
            "give the student it was trained on as --model",
        ) from error
    if missing := [w for w in told if "missing adapter keys" in str(w.message)]:
        reason = " ".join(str(missing[0].message).split())[:160]
        raise IncompatibleError(f"{adapter.folder}: {reason}")
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = f"holds no {_CONFIG}" if folder.is_dir() else "no such folder"
        raise UsageError(f"--adapter {folder}: {state}", "give a folder that PEFT wrote") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / _CONFIG}: expected a JSON object")
    return config


def _refuse_start(folder: Path) -> None:
    try:
        manifest = json.loads((folder / "pkt_manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and manifest.get("method") == "seeking":
        raise IncompatibleError(
            f"{folder}: expected a trained adapter, found an extracted start",
            "train from it first: as it is, it adds the teacher's window to the student",
        )


def _weights(folder: Path) -> tuple[dict[str, list[int]], str]:
    """Tensor shapes by name, and the adapter's hash."""
    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder}: expected {_WEIGHTS}, found {'a pickled one' if pickled else 'none'}",
            "save it with safetensors: nothing is unpickled" if pickled else None,
        )
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            shapes = {k: list(v["shape"]) for k, v in header.items() if k != "__metadata__"}
            file.seek(0)
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    return shapes, digest.hexdigest()


def _check_shapes(folder: Path, shapes: dict[str, list[int]], student: Model) -> None:
    """Compare LoRA factors (A: r × in, B: out × r) of decoder layers with the student's weights.

    What the headers cannot tell (modules under other names, other kinds of adapters) is left to
    PEFT's own check when the adapter is loaded.
    """
    stack = student.checkpoint.layer_path.rpartition(".")[2]
    pattern = re.compile(rf"\.{re.escape(stack)}\.(\d+)\.(.+)\.lora_([AB])(?:\.|$)")
    hint = "give the student it was trained on as --model"
    for name, shape in shapes.items():
        match = pattern.search(name)
        if not match:
            continue
        if int(match[1]) >= student.layers:
            raise IncompatibleError(
                f"{folder}: adapter of another student: it has a layer {match[1]}, "
                f"{student.folder} has {student.layers}",
                hint,
            )
        piece = student.checkpoint.layers[int(match[1])].get(f"{match[2]}.weight")
        if piece is None or len(piece.shape) != 2 or len(shape) != 2:
            continue
        out, given = piece.shape
        if student.family in _TRANSPOSED:
            out, given = given, out
        kind, size, wanted = ("in", shape[1], given) if match[3] == "A" else ("out", shape[0], out)
        if size != wanted:
            raise IncompatibleError(
                f"{folder}: adapter of another student: '{match[2]}' of layer {match[1]}: expected "
                f"{wanted} {kind} features, found {size}",
                hint,
            )
