"""What the parent asks of the launcher, and what the launcher adds before it starts the program.

Only light modules are imported here: the launcher starts once for every program.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

INSIDE_FOLDER = "/tmp"  # where the program's own folder lies in a mount namespace


class Job(NamedTuple):
    """One program and how to run it.

    `mode` is ``user`` (namespaces within a new user namespace), ``root`` (namespaces that root
    makes without one) or ``uid`` (another uid, Landlock, no namespaces).
    """

    program: str
    mode: str
    python: str
    libraries: list[str]
    harness: str
    seconds: float
    memory_bytes: int
    processes: int
    file_bytes: int
    output_bytes: int
    temporary: str  # where `uid` makes the program's folder
    # added by the launcher
    folder: str = INSIDE_FOLDER
    uid: int = 0  # of the program, as the launcher sees it; 0: the launcher's own
    other_processes: int = 0  # that the kernel counts with the program's

    @property
    def environment(self) -> dict[str, str]:
        """All that the program finds in `os.environ`."""
        return {
            "HOME": self.folder,
            "TMPDIR": self.folder,
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def encode(value: Any) -> bytes:
    """A length of 8 bytes and so many bytes of JSON; lone surrogates survive."""
    text = json.dumps(value).encode("ascii")
    return len(text).to_bytes(8, "big") + text
