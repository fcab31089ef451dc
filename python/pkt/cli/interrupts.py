"""Ctrl-C and SIGTERM become an `Interruption` in the main thread; finished layers are kept.

Not an `Exception`: code that turns every failure of a library into a message of its own must not
catch it. It can still be lost where Python calls back from C, so `check` raises it again at the
next step of the run. A long step that must not be lost (of training) defers it to its end instead.
A second signal acts as if pkt had no handler.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(KeyboardInterrupt):
    """A signal has come."""


class Interrupts:
    """The handlers, for the time of a ``with`` block in the main thread."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
        sys.unraisablehook = self._hook

    def check(self) -> None:
        """Raise `Interruption` if a signal has come."""
        if self.received is not None:
            raise Interruption

    @contextlib.contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """While the block runs, a signal only makes the yielded question true."""
        self._deferring = True
        try:
            yield lambda: self.received is not None
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if not self._deferring:
            self.check()

    def _unraisable(self, lost: Any) -> None:
        """An interruption that was lost needs no traceback: `check` will raise it again."""
        if lost.exc_type is not Interruption:
            self._hook(lost)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
