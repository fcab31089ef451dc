"""How far training is: a bar on a terminal, about twenty plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_LINES = 20


class Steps:
    """The `notify` of a training run.

    Args:
        write: takes each plain line.
        shown: whether anything is shown at all.
        terminal: bars instead of lines.

    """

    def __init__(
        self, write: Callable[[str], None], shown: bool, terminal: bool | None = None
    ) -> None:
        self._write, self._shown = write, shown
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._since, self._first = time.perf_counter(), 0
        self._bar: Any = None
        self.done = 0

    def __call__(self, phase: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Step ``done`` of ``total`` has ended, or was evaluated."""
        if phase != "train":  # of a teacher that is read before
            if self._shown and (done == total or done % max(1, total // 4) == 0):
                self._line(f"{phase} {done}/{total}")
            return
        if not self.done:
            self._since, self._first = time.perf_counter(), done
        self.done = max(self.done, done)
        if not self._shown:
            return
        if "eval_loss" in metrics:
            self._line(f"step {done:5}  held-out loss {metrics['eval_loss']:.4f}")
        elif self._terminal:
            self._draw(done, total, metrics)
        elif done in (self._first, total) or done % max(1, total // _LINES) == 0:
            self._line(
                f"step {done:5}/{total}  loss {metrics['loss']:.4f}  "
                f"lr {metrics['learning_rate']:.2e}{self._pace(done, total)}"
            )

    def close(self) -> None:
        """End the bar that is being drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _pace(self, done: int, total: int) -> str:
        if done <= self._first:
            return ""
        each = (time.perf_counter() - self._since) / (done - self._first)
        return f"  {each:.2f} s/step, {_duration(each * (total - done))} left"

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._write(text)

    def _draw(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread for it
            self._bar = tqdm(total=total, initial=done - 1, unit="step", file=sys.stderr)
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
        self._bar.update(done - self._bar.n)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
