"""What the commands of these names do, as functions: one module a command, none of which prints."""

from pkt.api.extracting import (
    check_device,
    execute,
    extract,
    inspect,
    prepare,
    require_fit,
)
from pkt.api.training import execute_training, pick_device, prepare_training, train

__all__ = [
    "check_device",
    "execute",
    "execute_training",
    "extract",
    "inspect",
    "pick_device",
    "prepare",
    "prepare_training",
    "require_fit",
    "train",
]
