"""Which tensor of a checkpoint each adapted module's weight is, found without reading one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pkt.adapter import Adapter
from pkt.checkpoint import FLOAT_DTYPES, Piece, find_outer
from pkt.errors import IncompatibleError
from pkt.models import Model

_LAYER = re.compile(r"^(?P<path>.+)\.(?P<index>\d+)\.(?P<suffix>.+)$")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the weight of an adapted module lies."""

    tensor: str  #: its name in the checkpoint, or the one it gets there
    source: Piece
    transposed: bool  #: an embedding: its factors are of the transposed weight


@dataclass(frozen=True, slots=True)
class Architecture:
    """The student's modules as transformers builds them, without weights."""

    student: Model
    modules: Mapping[str, nn.Module]
    embedding: str  #: module names of both ends
    head: str
    prefix: str  #: of the model without its head
    tied: bool  #: the configuration ties head and embedding
    loaded: frozenset[str]  #: names of parameters and buffers
    ignored: tuple[str, ...]  #: patterns of stored names that transformers passes over

    def places(self, adapters: Mapping[str, Adapter]) -> dict[str, Place]:
        """The place of every module that an adapter changes.

        Args:
            adapters: by the option that named them, for messages.

        Raises:
            IncompatibleError: a module, its weight or its shape does not exist in the student.

        """
        problems, found = [], {}
        for option, adapter in adapters.items():
            for name in adapter.factors:
                place = self._place(name, adapter)
                if isinstance(place, str):
                    problems.append(f"{option} {adapter.folder}: {name}: {place}")
                else:
                    found[name] = place
        if problems:
            more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise IncompatibleError(
                f"{problems[0]}{more}", f"is {self.student.name} the student? --student names it"
            )
        return found

    def parted(self, places: Mapping[str, Place]) -> dict[str, str]:
        """Tensors to add where head and embedding share one and a change parts them.

        Name of the new tensor → the source tensor that it begins as; empty where nothing is parted.
        """
        if not self.parts(places):
            return {}
        pairs = ((self.embedding, self.head), (self.head, self.embedding))
        return {
            f"{name}.weight": piece.name
            for name, other in pairs
            if self._own(name) is None and (piece := self._own(other)) is not None
        }

    def parts(self, names: Collection[str]) -> bool:
        """Whether head and embedding, tied until now, differ after the change."""
        return self.tied and (self.embedding in names or self.head in names)

    def unread(self) -> set[str]:
        """Stored tensors that transformers loads nothing from, as GPT-NeoX's old masks."""
        checkpoint = self.student.checkpoint
        stored = [
            piece.name
            for group in (*checkpoint.layers, checkpoint.outer)
            for piece in group.values()
        ]
        loaded = {self._bare(name) for name in self.loaded}
        return {
            name
            for name in stored
            if self._bare(name) not in loaded
            and any(re.search(pattern, name) for pattern in self.ignored)
        }

    def _place(self, name: str, adapter: Adapter) -> Place | str:
        module, half = self.modules.get(name), adapter.factors[name]
        if module is None:
            return f"the student ({self.student.family}) has no such module"
        transposed = name in adapter.embeddings
        kind: Any = nn.Embedding if transposed else nn.Linear
        if not isinstance(module, kind):
            return f"expected an nn.{kind.__name__}, found {type(module).__name__}"
        piece = self.piece(name)
        if piece is None:
            return f"the checkpoint {self.student.folder} holds no weight of it"
        if piece.dtype not in FLOAT_DTYPES:
            return f"expected floating-point weights, found {piece.dtype}"
        shape = (int(half.b.shape[0]), int(half.a.shape[1]))
        shape = shape[::-1] if transposed else shape
        if piece.shape != shape:
            return f"expected shape {piece.shape} of the student, found {shape}"
        own = self._own(name) is not None or name not in (self.embedding, self.head)
        return Place(piece.name if own else f"{name}.weight", piece, transposed)

    def piece(self, name: str) -> Piece | None:
        """The tensor that a module's weight is read from."""
        checkpoint = self.student.checkpoint
        found = _LAYER.match(name)
        if found and self._bare(found["path"]) == self._bare(checkpoint.layer_path):
            index, suffix = int(found["index"]), f"{found['suffix']}.weight"
            return checkpoint.layers[index].get(suffix) if index < len(checkpoint.layers) else None
        if (own := self._own(name)) is None and self.tied and name in (self.embedding, self.head):
            return self._own(self.embedding if name == self.head else self.head)
        return own

    def _own(self, name: str) -> Piece | None:
        return find_outer(self.student.checkpoint, f"{name}.weight", self.prefix)

    def _bare(self, path: str) -> str:
        return path.removeprefix(f"{self.prefix}.")


def open_architecture(student: Model) -> Architecture:
    """Build the student on the meta device.

    Raises:
        IncompatibleError: transformers cannot, or it has no embedding and head of its own.

    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    odd = (ValueError, KeyError, ImportError, AttributeError, TypeError, StrictDataclassError)
    folder: Path = student.folder
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except odd as error:
        reason = " ".join(str(error).split())[:200]
        raise IncompatibleError(
            f"{folder}: transformers cannot build this model: {reason}"
        ) from error
    modules = dict(model.named_modules())
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(end is None for end in ends):
        raise IncompatibleError(f"{folder}: '{student.family}' has no embedding or no head")
    names = {id(module): name for name, module in modules.items()}
    embedding, head = (names[id(end)] for end in ends)
    tied = bool(config.get_text_config().tie_word_embeddings)
    return Architecture(
        student, modules, embedding, head, model.base_model_prefix, tied,
        loaded=frozenset(model.state_dict()),
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )  # fmt: skip
