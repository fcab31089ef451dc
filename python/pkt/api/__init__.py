"""What the commands of these names do, as functions: one module a command, none of which prints."""

from pkt.api.evaluating import (
    data_formats,
    evaluate,
    execute_evaluation,
    prepare_evaluation,
)
from pkt.api.extracting import (
    check_device,
    execute,
    extract,
    inspect,
    prepare,
    require_fit,
)

__all__ = [
    "check_device",
    "data_formats",
    "evaluate",
    "execute",
    "execute_evaluation",
    "extract",
    "inspect",
    "prepare",
    "prepare_evaluation",
    "require_fit",
]
