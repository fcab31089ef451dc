"""How far a run is: a bar on a terminal, one plain line a layer elsewhere, nothing if quiet.

Each step says the bytes of teacher layers it has used, their rate since its phase began (reading
and computing together: the pace of the run, not of the disk), and the anonymous memory held.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from pkt.config import format_bytes
from pkt.host import anonymous_bytes

_UNITS = {
    "embed": "chunk", "head": "seed", "ends": "seed", "targets": "example", "maps": "map",
    "states": "file",
}  # fmt: skip
_STREAMED = ("forward", "again", "backward", "teacher")


class Progress:
    """The `notify` of an extraction.

    Args:
        layer_bytes: of one teacher layer.
        write: takes each plain line.
        terminal: bars instead of lines.

    """

    def __init__(
        self, layer_bytes: int, write: Callable[[str], None], terminal: bool | None = None
    ) -> None:
        self._layer_bytes, self._write = layer_bytes, write
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._phase, self._since, self._last = "", time.perf_counter(), time.perf_counter()
        self._first = 0  # steps of this phase that an earlier run had done
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Step ``done`` of ``total`` of ``phase`` has ended."""
        if phase != self._phase:
            self.close()
            self._phase, self._since, self._first = phase, self._last, done - 1
        self._last = time.perf_counter()
        if self._terminal:
            self._draw(done, total)
        elif phase not in _UNITS or done == total:
            self._write(self._line(done, total))

    def close(self) -> None:
        """End the bar that is being drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, done: int, total: int) -> str:
        unit = _UNITS.get(self._phase, "layer")
        return f"{self._phase:8} {done}/{total} {unit}s  {', '.join(self._figures(done))}"

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread for it
            unit = _UNITS.get(self._phase, "layer")
            size = shutil.get_terminal_size((100, 24))  # some terminals say 0 × 0: no bar then
            self._bar = tqdm(
                desc=f"{self._phase:8}", total=total, initial=self._first, unit=unit,
                file=sys.stderr, ncols=size.columns, nrows=size.lines,
            )  # fmt: skip
        self._bar.set_postfix_str(", ".join(self._figures(done)), refresh=False)
        self._bar.update(done - self._bar.n)

    def _figures(self, done: int) -> list[str]:
        figures = []
        if self._phase in _STREAMED:
            used = (done - self._first) * self._layer_bytes
            seconds = max(self._last - self._since, 1e-9)
            figures = [format_bytes(used), f"{used / seconds / 1e9:.2g} GB/s"]
        return [*figures, f"{format_bytes(anonymous_bytes())} held"]
