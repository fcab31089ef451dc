"""Ctrl-C and SIGTERM become an `InterruptError` in the main thread; finished layers are kept.

A handler's exception can be swallowed where Python calls back from C, so `check` raises it again
at the next step of the run. A second signal acts as if pkt had no handler.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pkt.errors import InterruptError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The handlers, for the time of a ``with`` block in the main thread."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `InterruptError` if a signal has come."""
        if self.received is not None:
            raise InterruptError(self.received, "interrupted")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        self.check()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
