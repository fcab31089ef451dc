"""Moves knowledge from a very large language model into a small one.

`pkt.inspect`, `pkt.extract`, `pkt.train` and `pkt.export` do what the commands of the same names
do and return the records of `pkt.records`. Importing pkt loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkt.api import export, extract, inspect, train

__version__ = "0.1.0"
__all__ = ["__version__", "export", "extract", "inspect", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pkt import api

        return getattr(api, name)
    raise AttributeError(f"module 'pkt' has no attribute '{name}'")
