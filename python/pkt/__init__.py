"""Moves knowledge from a very large language model into a small one.

`pkt.inspect`, `extract`, `align`, `train`, `export` and `evaluate` do what the commands do and
return the records of `pkt.records`, as does `write_targets` (`pkt align --targets-only`);
`pkt.compare.compare` puts starts side by side. Importing pkt loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkt.api import align, evaluate, export, extract, inspect, train, write_targets

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "align",
    "evaluate",
    "export",
    "extract",
    "inspect",
    "train",
    "write_targets",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pkt import api

        return getattr(api, name)
    raise AttributeError(f"module 'pkt' has no attribute '{name}'")
