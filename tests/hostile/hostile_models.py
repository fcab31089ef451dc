"""A tiny model folder, any byte of which can be wrong, and the ways to spoil it.

A `Model` is a sound Llama of two layers and eight channels, written by hand; a `Case` says how it
is spoiled, what `pkt inspect` must say of it and with which code it must end. Nothing needs torch.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
LARGEST = 2**64 - 1

SHAPES: dict[str, list[int]] = {
    EMBEDDING: [32, 8],
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": [8],
            "mlp.down_proj": [8, 16],
            "mlp.gate_proj": [16, 8],
            "mlp.up_proj": [16, 8],
            "post_attention_layernorm": [8],
            "self_attn.k_proj": [8, 8],
            "self_attn.o_proj": [8, 8],
            "self_attn.q_proj": [8, 8],
            "self_attn.v_proj": [8, 8],
        }.items()
    },
    "model.norm.weight": [8],
    "lm_head.weight": [32, 8],
}


@dataclass
class Shard:
    """A safetensors file before it is written."""

    header: dict[str, Any]
    data: bytes
    json: bytes | None = None  #: in place of the header
    length: int | None = None  #: said of the header, whatever it is

    @classmethod
    def of(cls, shapes: dict[str, list[int]], dtype: str = "F32", item: int = 4) -> Shard:
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, size = end, item
            for count in shape:
                size *= count
            end = begin + size
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        return cls(header, bytes(end))

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode() if self.json is None else self.json
        length = len(text) if self.length is None else self.length
        return struct.pack("<Q", length) + text + self.data


@dataclass
class Model:
    """A sound model folder before it is written."""

    config: dict[str, Any] = field(
        default_factory=lambda: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
            "vocab_size": 32,
        }
    )
    shards: dict[str, Shard] = field(default_factory=lambda: {FILE: Shard.of(SHAPES)})
    index: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)  #: as they are, over all others
    last: Callable[[Path], object] = lambda folder: None  #: what only a folder can have

    @property
    def only(self) -> Shard:
        return self.shards[FILE]

    def split(self) -> dict[str, str]:
        """Two shards and an index, whose weight map is returned."""
        first = {name: shape for name, shape in SHAPES.items() if ".layers.0." in name}
        rest = {name: shape for name, shape in SHAPES.items() if name not in first}
        self.shards = {"1.safetensors": Shard.of(first), "2.safetensors": Shard.of(rest)}
        names = {name: "1.safetensors" if name in first else "2.safetensors" for name in SHAPES}
        self.index = {"metadata": {}, "weight_map": names}
        return names

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        written = {"config.json": json.dumps(self.config).encode()}
        written |= {name: shard.bytes() for name, shard in self.shards.items()}
        if self.index is not None:
            written[INDEX] = json.dumps(self.index).encode()
        for name, content in (written | self.files).items():
            (folder / name).write_bytes(content)
        self.last(folder)
        return folder


Damage = Callable[[Model], object]


@dataclass(frozen=True)
class Case:
    """One hostile folder; ``said`` is in the one line of the error, {folder} its path."""

    name: str
    damage: Damage
    said: str
    code: int = 1


# How a model is spoiled. Each returns what does it.


def file(content: bytes, name: str = FILE) -> Damage:
    """This file holds these bytes."""
    return lambda model: model.files.update({name: content})


def length(claimed: int) -> Damage:
    """The file claims a header of this length."""
    return lambda model: setattr(model.only, "length", claimed)


def header(text: bytes | str) -> Damage:
    """The header is this text, the data as they are."""
    text = text.encode() if isinstance(text, str) else text
    return lambda model: setattr(model.only, "json", text)


def entry(name: str = Q, **fields: Any) -> Damage:
    """Fields of one tensor's entry are these."""
    return lambda model: model.only.header[name].update(fields)


def added(name: str, dtype: str, shape: list[int], size: int) -> Damage:
    """One tensor more, of ``size`` bytes."""

    def add(model: Model) -> None:
        end = len(model.only.data)
        offsets = [end, end + size]
        model.only.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        model.only.data += bytes(size)

    return add


def without(*endings: str) -> Damage:
    """Tensors whose names end so are not there."""

    def drop(model: Model) -> None:
        kept = {name: shape for name, shape in SHAPES.items() if not name.endswith(endings)}
        model.shards = {FILE: Shard.of(kept)}

    return drop


def shaped(dtype: str = "F32", item: int = 4, **shapes: list[int]) -> Damage:
    """Tensors whose names end so (dots as __) have these shapes."""

    def change(model: Model) -> None:
        changed = dict(SHAPES)
        for ending, shape in shapes.items():
            found = [
                name for name in SHAPES if name.endswith(f"{ending.replace('__', '.')}.weight")
            ]
            changed |= dict.fromkeys(found, shape)
        model.shards = {FILE: Shard.of(changed, dtype, item)}

    return change


def tail(change: Callable[[bytes], bytes]) -> Damage:
    """The data are changed, the header is not."""
    return lambda model: setattr(model.only, "data", change(model.only.data))


def config(**entries: Any) -> Damage:
    """config.json says this; ... takes an entry away."""

    def change(model: Model) -> None:
        model.config |= entries
        model.config = {key: value for key, value in model.config.items() if value is not ...}

    return change


def index(content: bytes | str) -> Damage:
    """Two shards, and this text as their index."""

    def change(model: Model) -> None:
        model.split()
        model.files[INDEX] = content.encode() if isinstance(content, str) else content

    return change


def mapped(shard: str, name: str = Q) -> Damage:
    """The index assigns a tensor to this shard."""
    return lambda model: model.split().update({name: shard})


def then(*damages: Damage, last: Callable[[Path], object] = lambda folder: None) -> Damage:
    """All of these, and ``last`` once the folder is written."""

    def change(model: Model) -> None:
        for damage in damages:
            damage(model)
        model.last = last

    return change


def instead(name: str, make: Callable[[Path], object], *damages: Damage) -> Damage:
    """Something else in place of a file."""

    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return then(*damages, last=replace)


def sparse(size: int, start: bytes = b"") -> Callable[[Path], object]:
    """A file of this size that takes no room."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def link(target: str) -> Callable[[Path], object]:
    """A link to there."""
    return lambda path: path.symlink_to(target)


def outside(path: Path) -> None:
    """A link to a sound file that lies beside the folder."""
    stranger = path.parent.parent / "stranger.safetensors"
    stranger.write_bytes(Shard.of({"a": [1]}).bytes())
    path.symlink_to(stranger)


def split(model: Model) -> None:
    """Two shards."""
    model.split()


def gone(name: str) -> Damage:
    """This file is not there."""
    return then(last=lambda folder: (folder / name).unlink())


def only_files(*names: str) -> Damage:
    """No weights, but files of these names."""

    def change(model: Model) -> None:
        model.shards = {}
        model.files = dict.fromkeys(names, b"\x80\x02}q\x00.")

    return change
