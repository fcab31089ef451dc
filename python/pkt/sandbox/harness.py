"""What runs in the sandbox's own interpreter: the program, and after its end the token.

Given to `python -c` as text. It reads the token and the program from file descriptor 4, and writes
to file descriptor 3: a newline when the program is about to start, then either the token or the
line that says how the program failed.
"""

import os
import sys
from types import ModuleType

_JOB, _RESULT = 4, 3


def _main() -> None:
    write, identity, leave = os.write, os.getpid, os._exit  # the program may replace these
    with open(_JOB, encoding="utf-8", errors="surrogatepass", newline="") as job:
        token, source = job.readline().rstrip("\n").encode(), job.read()
    os.set_inheritable(_RESULT, False)
    module = sys.modules["program"] = ModuleType("program")
    own = identity()
    write(_RESULT, b"\n")
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too
        if identity() == own:
            write(_RESULT, _reason(error).encode("utf-8", "backslashreplace")[:1000])
        leave(1)
    if identity() == own:  # a child that the program forked may not speak for it
        write(_RESULT, token)
    leave(0)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return f"exit code {code} before the tests ended"
    try:
        text = str(error)
    except Exception as second:
        text = f"(its text: {type(second).__name__})"
    name = type(error).__name__
    return f"{name}: {text}" if text else name


_main()
