"""What the commands of these names do, as functions: one module a command, none of which prints."""

from pkt.api.extracting import (
    check_device,
    execute,
    extract,
    inspect,
    prepare,
    require_fit,
)

__all__ = ["check_device", "execute", "extract", "inspect", "prepare", "require_fit"]
