"""Writing a laid-out model block by block, and reading it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pkt import _core
from pkt.checkpoint import Checkpoint
from pkt.errors import CheckpointError
from pkt.jsonfile import MAX_INDEX_BYTES, read_object, shown
from pkt.merging.blocks import NUMPY, Blocks
from pkt.merging.layout import INDEX, Layout, Output

_TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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
    blocks, errors, done = Blocks(checkpoint), {}, 0
    index = index_of(checkpoint, layout)
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
    if index is not None:
        (folder / INDEX).write_text(index, encoding="utf-8")
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
    ours, theirs, done = Blocks(checkpoint), Blocks(written), 0
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
                stored = theirs.read(piece, begin, end)
                source = ours.read(output.source, begin, end)
                if output.change is None and output.dtype == output.source.dtype:
                    same = bool(np.array_equal(stored, source))
                else:
                    same = _same(output, source, stored, ours.delta(output, begin, end))
                if not same:
                    raise CheckpointError(f"{where}: what was written is not W + Δ")
            done += output.bytes
            notify(output.name, done, layout.bytes)


def _write(blocks: Blocks, writer: _core.Writer, output: Output, checkpoint: Checkpoint) -> float:
    """Write one tensor; the relative rounding error of its change."""
    lost = whole = 0.0
    copied = output.change is None and output.dtype == output.source.dtype
    for begin, end in blocks.spans(output):
        raw = blocks.read(output.source, begin, end)
        if copied:
            writer.write(output.name, raw)
            continue
        target, delta = blocks.target(end - begin, output.dtype), blocks.delta(output, begin, end)
        error, change, bad = _core.merge(
            raw.view(NUMPY[output.source.dtype]), output.source.dtype,
            None if delta is None else delta.numpy(), target, output.dtype,
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


def _same(
    output: Output,
    source: NDArray[np.uint8],
    stored: NDArray[np.uint8],
    delta: torch.Tensor | None,
) -> bool:
    base = torch.from_numpy(source).view(_TORCH[output.source.dtype])
    expected = base.to(torch.float64 if output.source.dtype == "F64" else torch.float32, copy=True)
    if delta is not None:
        expected += delta
    found = torch.from_numpy(stored).view(_TORCH[output.dtype])
    return torch.equal(found, expected.to(found.dtype))


def index_of(checkpoint: Checkpoint, layout: Layout) -> str | None:
    """The index of the new model; ``None`` where one file is the whole.

    Raises:
        CheckpointError: the old one is not as transformers needs it.

    """
    if not layout.indexed:
        return None
    source = checkpoint.folder / INDEX
    metadata = read_object(source, MAX_INDEX_BYTES).get("metadata")
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{source}: metadata: expected an object, found {shown(metadata)}",
            'transformers does not load such a model; write "metadata": {} there',
        )
    outputs = [(o, name) for name, shard in layout.shards.items() for o in shard]
    metadata["total_size"] = layout.bytes
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(output.source.elements for output, _ in outputs)
    weight_map = {output.name: name for output, name in sorted(outputs, key=lambda o: o[0].name)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
