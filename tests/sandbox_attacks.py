"""Programs that try to get out of the sandbox, and a process that runs them beside its victims.

`python sandbox_attacks.py MODE` runs them in one way of isolation and prints what became of them
and of the victims as JSON; it needs pkt.sandbox and the standard library alone. Each program finds
defined: PARENT and VICTIM (process ids on the host), PORT (somebody listens there), OUTSIDE (a
folder) and MARK (a name for its children).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from pkt import sandbox

MIB = 1 << 20


class Attack(NamedTuple):
    program: str
    reason: str = "passed"  # a regular expression; "passed": the program itself saw its failure
    limits: dict[str, float] = {}  # noqa: RUF012 (never written)


_C = "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = {
    # time
    "infinite loop": Attack("while True: pass", r"timed out after 1 s", {"seconds": 1}),
    "sleep": Attack("import time; time.sleep(1000)", r"timed out after 1 s", {"seconds": 1}),
    "stop itself": Attack(
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timed out", {"seconds": 1}
    ),
    # processes
    "fork bomb": Attack(
        """
import ctypes, os
ctypes.CDLL(None).prctl(15, MARK.encode())
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        "timed out",
        {"seconds": 1},
    ),
    "forks are counted": Attack(
        """
import os, time
count = 0
try:
    for count in range(1000):
        if not os.fork():
            time.sleep(1000)
except BlockingIOError:
    pass
assert 1 < count < 40, count
"""
    ),
    "threads are counted": Attack(
        """
import threading, time
count = 0
try:
    for count in range(1000):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
except RuntimeError:
    pass
assert 1 < count < 40, count
"""
    ),
    "left in the background": Attack(
        """
import ctypes, os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        ctypes.CDLL(None).prctl(15, MARK.encode())
        time.sleep(1000)
    os._exit(0)
os.wait()
time.sleep(0.1)
"""
    ),
    "kill the parent": Attack(
        """
import os
for process in (PARENT, VICTIM, os.getppid(), 1):
    try:
        os.kill(process, 9)
    except (PermissionError, ProcessLookupError):
        pass
try:
    os.kill(-1, 9)
except (PermissionError, ProcessLookupError):
    pass
try:
    os.killpg(PARENT, 9)
except (PermissionError, ProcessLookupError):
    pass
"""
    ),
    "kill its group": Attack("import os; os.killpg(0, 9)", "killed by signal 9"),
    # memory
    "100 GB": Attack("bytearray(100 << 30)", "memory"),
    "memory never touched": Attack(
        """
import mmap
try:
    mmap.mmap(-1, 2 << 30)
except OSError:
    pass
else:
    raise AssertionError
"""
    ),
    "many lists": Attack(
        "x = []\nwhile True: x.append([0] * 100000)", "memory", {"memory_bytes": 256 * MIB}
    ),
    "many processes' memory": Attack(
        """
import os, time
for _ in range(12):
    if not os.fork():
        held = bytearray(b"x") * (60 << 20)
        time.sleep(1000)
assert os.wait()[1] == 0, "one of them was ended"
""",
        "memory",
        {"memory_bytes": 256 * MIB},
    ),
    "memory without an address": Attack(
        """
import os
try:
    os.memfd_create("x")
except PermissionError:
    pass
else:
    raise AssertionError
"""
        + _C
        + "assert libc.shmget(0, 1 << 20, 0o1600) == -1"
    ),
    # output and files
    "endless output": Attack("while True: print('x' * 1000)", "output over 65536 bytes"),
    "huge file": Attack(
        "with open('x', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
        "OSError: .*(File too large|No space left)|files over",
    ),
    "sparse file": Attack("open('x', 'wb').truncate(1 << 40)", "OSError: .*File too large"),
    "many files": Attack(
        """
for number in range(100000):
    with open(f"x{number}", "wb") as file:
        file.write(bytes(1 << 18))
""",
        "OSError: .*No space left|files over",
    ),
    "deep folders": Attack(
        "import os\nfor _ in range(60):\n    os.mkdir('x' * 100)\n    os.chdir('x' * 100)",
        "passed|files over",
    ),
    "write outside": Attack(
        """
import os
home = "/root", "/home", os.path.expanduser("~root")
places = [OUTSIDE, "..", "/", "/tmp/..", "/etc", "/usr/lib", "/var/tmp", "/dev/shm", "/run", *home]
if os.getcwd() != "/tmp":
    places.append("/tmp")
for place in places:
    try:
        open(f"{place}/{MARK}", "w").close()
    except OSError:
        continue
    raise AssertionError(f"wrote to {place}")
for path in ("/etc/passwd", "/etc/ld.so.cache", "/usr/lib/os-release", f"{OUTSIDE}/victim"):
    try:
        open(path, "a").close()
    except OSError:
        continue
    raise AssertionError(f"opened {path}")
if os.getcwd() == "/tmp":  # a mount namespace: also what the program's uid owns is read-only
    import sys
    for path in ("/", "/usr/lib", "/dev/null", os.__file__, sys.executable):
        assert os.statvfs(path).f_flag & os.ST_RDONLY, path
"""
    ),
    "read the host's files": Attack(
        """
import os
import sys
for path in (f"{OUTSIDE}/victim", "/etc/passwd", "/etc/hostname", "/proc/self/stat"):
    try:
        open(path).close()
    except OSError:
        continue
    raise AssertionError(f"read {path}")
for folder in ("/root", "/home", "/var", "/proc", "/sys", "/etc"):
    try:
        names = os.listdir(folder)
    except OSError:
        continue
    names = set(names) - {"ld.so.cache"} - set(sys.base_prefix.split("/"))
    assert not names, (folder, names)
"""
    ),
    # secrets
    "environment": Attack(
        """
import os
assert set(os.environ) == {"HOME", "TMPDIR", "PATH", "LANG", "TZ", "PYTHONHASHSEED",
                           "PYTHONDONTWRITEBYTECODE"} | set(os.environ) & {"LC_CTYPE"}, os.environ
for process in (PARENT, VICTIM, os.getppid(), 1, "self"):
    try:
        open(f"/proc/{process}/environ", "rb").read()
    except OSError:
        continue
    raise AssertionError(process)
"""
    ),
    "memory of others": Attack(
        _C
        + """
import os
for process in (PARENT, VICTIM, os.getppid(), 1):
    try:
        open(f"/proc/{process}/mem", "rb")
    except OSError:
        pass
    else:
        raise AssertionError(process)
    assert libc.ptrace(16, process, 0, 0) == -1
    assert libc.process_vm_readv(process, None, 0, None, 0, 0) == -1
    assert ctypes.get_errno() == errno.EPERM
"""
    ),
    "descriptors": Attack(
        """
import os
for number in range(4, 1100):
    try:
        os.fstat(number)
    except OSError:
        continue
    raise AssertionError(f"{number} is open")
try:
    input()
except EOFError:
    pass
else:
    raise AssertionError
"""
    ),
    # network
    "network": Attack(
        """
import socket
for connect in (
    lambda: socket.create_connection(("127.0.0.1", PORT), timeout=5),
    lambda: socket.socket(socket.AF_UNIX),
    lambda: socket.socket(socket.AF_NETLINK),
):
    try:
        connect()
    except PermissionError:
        continue
    raise AssertionError
socket.socketpair()
"""
    ),
    # privileges
    "privileges": Attack(
        _C
        + """
import os
assert os.getuid() and os.geteuid() and os.getgid() and 0 not in os.getgroups()
for change in (os.setuid, os.setgid, os.seteuid):
    try:
        change(0)
    except OSError:
        continue
    raise AssertionError(change)
for flags in (0x10000000, 0x00020000, 0x40000000):
    assert libc.unshare(flags) == -1
    assert libc.syscall(56 if os.uname().machine == "x86_64" else 220, flags | 17, 0, 0, 0, 0) == -1
assert libc.mount(None, b"/", None, 32 | 4096, None) == -1
assert libc.syscall(425, 1, None) == -1
assert libc.setpriority(0, 0, -20) == -1
import resource
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
except ValueError:
    pass
else:
    raise AssertionError
"""
    ),
}

# What the harness alone answers for, however the program is isolated.
CHEATS = {
    "says passed": Attack("print('passed')\nassert False", "AssertionError"),
    "exits early": Attack("import sys; sys.exit(0)", "exit code 0 before the tests ended"),
    "exits earlier": Attack("import os; os._exit(0)", "exit code 0"),
    "exits with words": Attack("exit_ = SystemExit('passed'); raise exit_", "exit code 1 before"),
    "writes passed everywhere": Attack(
        """
import os
for number in range(64):
    try:
        os.write(number, b"passed")
    except OSError:
        pass
os._exit(0)
""",
        "exit code 0",
    ),
    "reads the token": Attack(
        """
import os
for number in range(64):
    try:
        os.lseek(number, 0, 0)
        text = os.read(number, 1000)
    except OSError:
        continue
    if text:
        os.write(3, text.split()[0])
        os._exit(0)
raise ValueError("nothing to read")
""",
        "ValueError: nothing to read",
    ),
    "reports passed as its failure": Attack(
        "import os; os.write(3, b'passed'); os._exit(1)", "forged result"
    ),
    "a child passes": Attack("import os\nif os.fork(): os._exit(0)", "exit code 0"),
    "replaces the exits": Attack(
        """
import builtins, os, sys
os.write = os._exit = os.getpid = sys.exit = lambda *a: 0
builtins.isinstance = lambda *a: False
raise SystemExit(0)
""",
        "^(?!passed)",
    ),
    "leaves at the end": Attack(
        "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError('no')", "ValueError: no"
    ),
    "an error without words": Attack(
        "class E(Exception):\n    def __str__(self): raise KeyError\nraise E", "E: "
    ),
    "an error of many lines": Attack("raise ValueError('a\\nb\\x1b[2J' * 1000)", "ValueError: a b"),
    "interrupts": Attack("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "regular expression": Attack(
        "import re; re.match('(a+)+b', 'a' * 60)", "timed out", {"seconds": 1}
    ),
    "recursion": Attack("def f(n): return f(n + 1)\nf(0)", "RecursionError: "),
    "deep recursion": Attack(
        "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return [*map(f, [n + 1])]\nf(0)",
        "killed by signal 11|memory|RecursionError",
    ),
    "endless errors": Attack(
        "import os\nwhile True: os.write(2, b'x' * 1000)", "output over 65536 bytes"
    ),
    "endless result": Attack("import os\nwhile True: os.write(3, b'x' * 1000)", "output to the"),
    "output at the end": Attack("print('x' * 70000)", "output over 65536 bytes"),
    "kill itself": Attack("import os; os.kill(os.getpid(), 15)", "killed by signal 15"),
    "no program": Attack("def f(:", "SyntaxError: "),
    "no text": Attack("x = '\ud800\0'", "Error"),
}


def processes(name: str) -> list[str]:
    """Processes of the host by that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def main(mode: str) -> None:
    sandbox._way = lambda: (mode, [])
    with (
        tempfile.TemporaryDirectory() as outside,
        socket.create_server(("127.0.0.1", 0)) as server,
        tempfile.TemporaryFile() as secret,
        subprocess.Popen(["sleep", "1000"]) as victim,
        contextlib.ExitStack() as end,
    ):
        end.callback(victim.kill)
        Path(outside, "victim").write_text("untouched")
        os.chmod(outside, 0o755)
        os.dup2(secret.fileno(), 200)  # inheritable, and out of the way of the program's own
        os.environ["PKT_SECRET"] = "secret"
        mark = f"pkt{secrets.token_hex(5)}"
        given = (
            f"PARENT, VICTIM, PORT = {os.getpid()}, {victim.pid}, {server.getsockname()[1]}\n"
            f"OUTSIDE, MARK = {outside!r}, {mark!r}\n"
        )
        found = {}
        by_limits: dict[str, list[str]] = {}
        for name, attack in ATTACKS.items():
            by_limits.setdefault(json.dumps(attack.limits), []).append(name)
        for limits, names in by_limits.items():
            programs = [given + ATTACKS[name].program for name in names]
            outcomes = sandbox.run_all(programs, sandbox.Limits(**json.loads(limits)), workers=3)
            found |= {
                name: (one.passed, one.reason) for name, one in zip(names, outcomes, strict=True)
            }
        server.setblocking(False)
        try:
            server.accept()
            connected = True
        except BlockingIOError:
            connected = False
        state = {
            "outcomes": found,
            "connected": connected,
            "victim ended": victim.poll() is not None,
            "outside": sorted(os.listdir(outside)),
            "victim file": Path(outside, "victim").read_text(),
            "processes left": processes(mark),
            "folders left": [
                str(path) for path in Path(tempfile.gettempdir()).glob("pkt-sandbox-*")
            ],
        }
    json.dump(state, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
