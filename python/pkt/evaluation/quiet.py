"""lm-eval draws bars, prints and logs: kept from the terminal unless someone debugs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def silence(quiet: bool = True) -> Iterator[Callable[..., None]]:
    """Keep stdout, stderr and all logging quiet; yields what calls a function aloud."""
    if not quiet:
        yield lambda call, *given: call(*given)
        return
    out, err = sys.stdout, sys.stderr

    def aloud(call: Callable[..., None], *given: Any) -> None:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call(*given)

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield aloud
    finally:
        logging.disable(level)
