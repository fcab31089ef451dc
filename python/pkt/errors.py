"""What can go wrong, each with the exit code its command ends with.

A message is one clear line (what, where, expected, found) and may carry a hint (the remedy).
The Rust core raises `CheckpointError` from here: each class is defined once.
"""

from __future__ import annotations


class PktError(Exception):
    """A known failure: damaged input, a refused output folder, a full disk."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(PktError):
    """A checkpoint is damaged, pickled, or holds NaN or infinite values."""


class DivergenceError(PktError):
    """A loss is NaN or infinite: training diverged, or the weights are damaged."""


class OutputError(PktError):
    """The output folder is refused, not writable, in use, or its disk is full."""


class UsageError(PktError):
    """The request itself is incomplete or contradicts itself."""

    exit_code = 2


class IncompatibleError(PktError):
    """Teacher and student, or a model and pkt, do not fit together."""

    exit_code = 3


class BudgetError(PktError):
    """The run does not fit the memory or disk it is given."""

    exit_code = 4


class DataError(PktError):
    """The seeds or the training data cannot be used."""

    exit_code = 5


class InterruptError(PktError):
    """A signal ended the run; its finished layers are kept."""

    def __init__(self, signal_number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
