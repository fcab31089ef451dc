"""A model folder written anew: some matrices changed by a low-rank product, all else as it was.

Tensors are read, changed and written in blocks of rows, so memory holds a few blocks and never a
shard. A block of Δ is ``B[rows] @ A`` in float32; the Rust core adds it to the stored weights in
float32, rounds to nearest even and measures what rounding took from Δ. Tensors without a change
are copied byte for byte, unless another element type is asked for. Files are those of the source:
the same shards, the same order of tensors.
"""

from pkt.merging.files import copy_rest, new_config, rest_of
from pkt.merging.layout import Change, Layout, Output, lay_out
from pkt.merging.writing import compare_model, index_of, write_model

__all__ = [
    "Change",
    "Layout",
    "Output",
    "compare_model",
    "copy_rest",
    "index_of",
    "lay_out",
    "new_config",
    "rest_of",
    "write_model",
]
