"""LoRA folders in PEFT's format: written, read from anyone, put side by side, recompressed."""

from pkt.adapter.folder import (
    adapter_config,
    adapter_tensors,
    check_adapter,
    write_adapter,
    write_factors,
)
from pkt.adapter.products import Compressed, product_norm, recompress, side_by_side
from pkt.adapter.reading import Adapter, read_adapter, read_factors

__all__ = [
    "Adapter",
    "Compressed",
    "adapter_config",
    "adapter_tensors",
    "check_adapter",
    "product_norm",
    "read_adapter",
    "read_factors",
    "recompress",
    "side_by_side",
    "write_adapter",
    "write_factors",
]
