"""What the commands of these names do, as functions: one module a command, none of which prints."""

from pkt.api.exporting import execute_export, export, finished_export, prepare_export
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
    "execute_export",
    "execute_training",
    "export",
    "extract",
    "finished_export",
    "inspect",
    "pick_device",
    "prepare",
    "prepare_export",
    "prepare_training",
    "require_fit",
    "train",
]
