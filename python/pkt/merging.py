"""A model folder written anew: some matrices changed by a low-rank product, all else as it was.

Tensors are read, changed and written in blocks of rows, so memory holds a few blocks and never a
shard. A block of Δ is ``B[rows] @ A`` in float32; the Rust core adds it to the stored weights in
float32, rounds to nearest even and measures what rounding took from Δ. Tensors without a change
are copied byte for byte, unless another element type is asked for. Files are those of the source:
the same shards, the same order of tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pkt import _core
from pkt.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, Piece
from pkt.errors import CheckpointError, IncompatibleError

BLOCK_BYTES = 8 << 20  # of a block of Δ in float32, or of a copy
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PAGE = 4096
_READ_THREADS = 2  # a block is one positional read
_NUMPY: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
_TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
    ".onnx_data", ".ot", ".npz", ".pkl", ".zip", ".tar", ".gz", ".part",
})  # fmt: skip
_NOT_COPIED = frozenset({"README.md", "adapter_config.json", "config.json", INDEX})
_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer


@dataclass(frozen=True, slots=True)
class Change:
    """``b @ a``, added to a stored matrix (rows, columns): b (rows, r), a (r, columns), float32."""

    b: torch.Tensor
    a: torch.Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the new model."""

    name: str
    source: Piece
    dtype: str  #: safetensors' spelling
    change: Change | None = None

    @property
    def bytes(self) -> int:
        """Bytes in its file."""
        if self.dtype == self.source.dtype:
            return self.source.bytes
        return self.source.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of the new model, by name, in order."""

    shards: Mapping[str, Sequence[Output]]
    indexed: bool  #: whether an index names them

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.bytes for shard in self.shards.values() for output in shard)


def lay_out(
    checkpoint: Checkpoint,
    changes: Mapping[str, Change],
    dtype: str | None = None,
    added: Mapping[str, str] | None = None,
) -> Layout:
    """Say which tensor goes where; nothing is read.

    Args:
        checkpoint: the source.
        changes: by the new model's tensor names.
        dtype: element type of every floating-point tensor; ``None`` keeps each one's own.
        added: tensors the source lacks: name → the source tensor it begins as. They are appended
            to the last file (a head that was tied, to be parted from the embedding).

    Raises:
        IncompatibleError: a changed tensor is no float matrix, or is kept in 8 bits.

    """
    pieces: dict[str, Piece] = {}
    for group in (*checkpoint.layers, checkpoint.outer):
        for piece in group.values():
            pieces[piece.name] = piece
    indexed = (checkpoint.folder / INDEX).is_file()
    shards: dict[str, list[Output]] = {}
    for path, _ in checkpoint.files:
        shards[str(path.relative_to(checkpoint.folder)) if indexed else SINGLE] = []
    names = list(shards)
    for piece in sorted(pieces.values(), key=lambda p: (p.shard, p.begin, p.end, p.name)):
        shards[names[piece.shard]].append(_output(piece.name, piece, changes, dtype, checkpoint))
    for name, source in (added or {}).items():
        shards[names[-1]].append(_output(name, pieces[source], changes, dtype, checkpoint))
    placed = {output.name for shard in shards.values() for output in shard}
    assert changes.keys() <= placed, changes.keys() - placed
    return Layout({name: shard for name, shard in shards.items() if shard}, indexed)


def write_model(
    checkpoint: Checkpoint,
    layout: Layout,
    folder: Path,
    notify: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, float]:
    """Write the tensors, and the index if there is one; each file appears whole.

    Args:
        checkpoint: the source of ``layout``.
        layout: of `lay_out`.
        folder: existing.
        notify: told of (file, bytes of tensors written, of how many) after every tensor.

    Returns:
        for each changed tensor ‖round(W + Δ) − (W + Δ)‖_F / ‖Δ‖_F, 0 where Δ = 0.

    Raises:
        CheckpointError: a sum is NaN or infinite; names the tensor.
        OSError: the file cannot be written.

    """
    blocks, errors, done = _Blocks(checkpoint), {}, 0
    for name, outputs in layout.shards.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = [(o.name, o.dtype, list(o.source.shape)) for o in outputs]
        writer = _core.Writer(str(path), specs)
        try:
            for output in outputs:
                error = _write(blocks, writer, output, checkpoint)
                if output.change is not None:
                    errors[output.name] = error
                done += output.bytes
                notify(name, done, layout.bytes)
            writer.finish()
        finally:
            writer.close()
    if layout.indexed:
        _write_index(checkpoint.folder / INDEX, layout, folder / INDEX)
    return errors


def compare_model(
    checkpoint: Checkpoint,
    layout: Layout,
    written: Checkpoint,
    notify: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """Read the written model back and compare every element with W + Δ as torch computes it.

    Raises:
        CheckpointError: names the first tensor that is not what it should be.

    """
    ours, theirs, done = _Blocks(checkpoint), _Blocks(written), 0
    found = {piece.name: piece for piece in written.outer.values()}
    found |= {piece.name: piece for layer in written.layers for piece in layer.values()}
    for outputs in layout.shards.values():
        for output in outputs:
            piece = found.get(output.name)
            where = f"{written.folder}: tensor '{output.name}'"
            wanted = (output.dtype, output.source.shape)
            if piece is None or (piece.dtype, piece.shape) != wanted:
                raise CheckpointError(f"{where}: expected {wanted}, found {piece and piece.shape}")
            for begin, end in ours.spans(output):
                stored = theirs.read(_slice(piece, begin, end))
                source = ours.read(_slice(output.source, begin, end))
                if output.change is None and output.dtype == output.source.dtype:
                    same = bool(np.array_equal(stored, source))
                else:
                    same = _same(output, source, stored, begin, end)
                if not same:
                    raise CheckpointError(f"{where}: what was written is not W + Δ")
            done += output.bytes
            notify(output.name, done, layout.bytes)


def copy_rest(source: Path, folder: Path, config: Mapping[str, Any] | None) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, generation, chat templates.

    Args:
        source: the model's folder.
        folder: existing.
        config: the new config.json; ``None`` copies the old one byte for byte.

    """
    for path in sorted(source.iterdir()):
        name = path.name
        if path.is_dir() and name == _TEMPLATES:
            shutil.copytree(path, folder / name)
        elif path.is_file() and _is_copied(name):
            shutil.copyfile(path, folder / name)
    if config is None:
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


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


def _is_copied(name: str) -> bool:
    hidden = name.startswith((".", "pkt_"))
    index = name.endswith(".index.json")
    return not (hidden or index or name in _NOT_COPIED or Path(name).suffix.lower() in _WEIGHTS)


def _output(
    name: str,
    piece: Piece,
    changes: Mapping[str, Change],
    dtype: str | None,
    checkpoint: Checkpoint,
) -> Output:
    change = changes.get(name)
    kept = dtype is None or piece.dtype not in FLOAT_DTYPES
    stored = piece.dtype if kept or dtype is None else dtype
    if change is None:
        return Output(name, piece, stored)
    where = f"{checkpoint.folder}: tensor '{name}'"
    shape = (change.b.shape[0], change.a.shape[1])
    if piece.dtype not in FLOAT_DTYPES:
        raise IncompatibleError(f"{where}: expected floating-point weights, found {piece.dtype}")
    if stored.startswith("F8"):
        raise IncompatibleError(
            f"{where}: it is stored in {stored}, whose 8 bits would swallow the change",
            "add --dtype bfloat16 or --dtype float32",
        )
    if piece.shape != shape:
        raise IncompatibleError(f"{where}: expected shape {shape}, found {piece.shape}")
    return Output(name, piece, stored, change)


class _Blocks:
    """Parts of a checkpoint's tensors, read into one buffer that the next read overwrites."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = [(str(path), size) for path, size in checkpoint.files]
        self._reader = _core.Reader(files, "buffered", _READ_THREADS)
        self._memory = _aligned(BLOCK_BYTES + _PAGE)

    @staticmethod
    def spans(output: Output) -> list[tuple[int, int]]:
        """Half-open ranges of elements, whole rows of changed matrices, of a block each."""
        count = output.source.elements
        if output.change is None:
            step = BLOCK_BYTES // max(DTYPE_BYTES.get(output.dtype, 8), 4)
        else:
            columns = output.source.shape[1]
            step = max(1, BLOCK_BYTES // (4 * columns)) * columns
        return [(begin, min(begin + step, count)) for begin in range(0, count, step)]

    def read(self, piece: Piece) -> NDArray[np.uint8]:
        """The bytes of ``piece``, valid until the next call."""
        extent = (piece.shard, piece.begin, piece.end, _core.dtype_bytes(piece.dtype))
        layout = _core.layout([extent])
        if layout.bytes > len(self._memory):
            self._memory = _aligned(layout.bytes)
        self._reader.read(layout, self._memory[: layout.bytes])
        place = layout.places[0]
        return self._memory[place : place + piece.bytes]


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + _PAGE, dtype=np.uint8)
    return memory[-memory.ctypes.data % _PAGE :][:size]


def _slice(piece: Piece, begin: int, end: int) -> Piece:
    """Elements ``begin`` to ``end`` of a tensor, as a flat piece."""
    item = _core.dtype_bytes(piece.dtype)
    first = piece.begin + begin * item
    return replace(piece, shape=(end - begin,), begin=first, end=first + (end - begin) * item)


def _write(blocks: _Blocks, writer: _core.Writer, output: Output, checkpoint: Checkpoint) -> float:
    """Write one tensor; the relative rounding error of its change."""
    lost = whole = 0.0
    copied = output.change is None and output.dtype == output.source.dtype
    for begin, end in blocks.spans(output):
        raw = blocks.read(_slice(output.source, begin, end))
        if copied:
            writer.write(output.name, raw)
            continue
        target = np.empty(end - begin, dtype=_NUMPY[output.dtype])
        delta = _delta(output, begin, end)
        error, change, bad = _core.merge(
            raw.view(_NUMPY[output.source.dtype]), output.source.dtype,
            None if delta is None else delta.view(-1).numpy(), target, output.dtype,
        )  # fmt: skip
        if bad is not None:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{output.name}': element {begin + bad} is NaN or "
                f"infinite in {output.dtype}",
                "the weights, the adapter or the range of the element type; "
                "--dtype float32 has the widest",
            )
        writer.write(output.name, target.view(np.uint8))
        lost, whole = lost + error, whole + change
    return float((lost / whole) ** 0.5) if whole else 0.0


def _delta(output: Output, begin: int, end: int) -> torch.Tensor | None:
    """The rows of Δ that hold elements ``begin`` to ``end``."""
    if output.change is None:
        return None
    columns = output.source.shape[1]
    return output.change.b[begin // columns : end // columns] @ output.change.a


def _same(
    output: Output, source: NDArray[np.uint8], stored: NDArray[np.uint8], begin: int, end: int
) -> bool:
    base = torch.from_numpy(source.copy()).view(_TORCH[output.source.dtype])
    wide = base.double() if output.source.dtype == "F64" else base.float()
    delta = _delta(output, begin, end)
    expected = wide if delta is None else wide + delta.view(-1)
    found = torch.from_numpy(stored.copy()).view(_TORCH[output.dtype])
    return torch.equal(found, expected.to(found.dtype))


def _write_index(source: Path, layout: Layout, path: Path) -> None:
    try:
        metadata = json.loads(source.read_text(encoding="utf-8")).get("metadata") or {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot be read: {error}") from error
    outputs = [(o, name) for name, shard in layout.shards.items() for o in shard]
    metadata["total_size"] = layout.bytes
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(output.source.elements for output, _ in outputs)
    weight_map = {output.name: name for output, name in sorted(outputs, key=lambda o: o[0].name)}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
