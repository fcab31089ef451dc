"""Programs that a model wrote: what is right passes, what is wrong fails, and nothing gets out.

Every attack runs in each way of isolation that the host allows to the user of the tests, and as
an ordinary user where that user is root.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox_attacks
from pkt import sandbox
from pkt.errors import PktError, UsageError
from pkt.sandbox import Limits, Outcome, cgroup
from sandbox_attacks import ATTACKS, CHEATS, processes

PACKAGE = Path(sandbox.__file__).parents[1]
ORDINARY = 12345  # a uid that is nobody's
ROOT = os.geteuid() == 0

# name, head of the function, what is right, what is wrong, tests
PROBLEMS = [
    ("add", "def add(a, b):", "return a + b", "return a - b", ["add(2, 3) == 5"]),
    ("double", "def double(xs: List[int]) -> List[int]:", "return [2 * x for x in xs]",
     "return xs * 2", ["double([]) == []", "double([1, 2]) == [2, 4]"]),
    ("is_prime", "def is_prime(n):",
     "return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))",
     "return n % 2 == 1", ["is_prime(2)", "not is_prime(9)", "is_prime(97)"]),
    ("common", "def common(a, b):", "return sorted(set(a) & set(b))", "return sorted(a)",
     ["common([3, 1, 2], [2, 3, 4]) == [2, 3]"]),
    ("reverse", "def reverse(s: str) -> str:", "return s[::-1]", "return s[:-1]",
     ["reverse('añb') == 'bña'"]),
    ("count", "def count(words):", "return dict(collections.Counter(words))",
     "return {w: 1 for w in words}", ["count(['a', 'b', 'a']) == {'a': 2, 'b': 1}"]),
    ("fib", "def fib(n):", "return n if n < 2 else fib(n - 1) + fib(n - 2)", "return n",
     ["fib(10) == 55"]),
    ("root", "def root(x: float) -> float:", "return x ** 0.5", "return x / 2",
     ["abs(root(2.0) - 1.41421356) < 1e-6"]),
    ("flat", "def flat(x):", "return [z for y in x for z in y]", "return None",
     ["flat([[1], [2, 3]]) == [1, 2, 3]"]),
    ("even", "def even(n):", "return not n % 2", "return undefined", ["even(4)", "not even(3)"]),
]  # fmt: skip


def solved(problem: tuple[str, str, str, str, list[str]], place: int) -> str:
    """A program in HumanEval's form: prompt with a docstring, body, tests, and their call."""
    name, head, *bodies, checks = problem
    prompt = (
        f'import collections\nimport math\nfrom typing import List\n\n\n{head}\n    """{name}."""\n'
    )
    tests = "".join(f"    assert {check}\n" for check in checks).replace(f"{name}(", "candidate(")
    return f"{prompt}    {bodies[place]}\n\n\ndef check(candidate):\n{tests}\ncheck({name})\n"


def test_right_solutions_pass_and_wrong_ones_fail_in_the_order_given() -> None:
    programs = [solved(problem, place) for problem in PROBLEMS for place in (0, 1)]
    told = []
    found = sandbox.run_all(programs, workers=2, notify=lambda *step: told.append(step))
    assert [outcome.passed for outcome in found] == [True, False] * len(PROBLEMS)
    assert found[0] == Outcome(True, "passed")
    assert found[1].reason == "AssertionError"
    assert found[-1].reason == "NameError: name 'undefined' is not defined"
    assert told == [("programs", done + 1, len(programs)) for done in range(len(programs))]


def test_a_program_is_run_as_humaneval_does() -> None:
    program = """
import dataclasses, random, tempfile, threading, subprocess, asyncio, decimal, zoneinfo, ctypes
assert __name__ == "program"
@dataclasses.dataclass
class Point:
    x: int
assert Point(1) == Point(1)
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("text")
assert asyncio.run(asyncio.sleep(0, 5)) == 5
threading.Thread(target=print).start()
if __name__ == "__main__":
    raise AssertionError
"""
    assert sandbox.run(program) == Outcome(True, "passed")


def test_sets_keep_their_order_from_run_to_run() -> None:
    program = "raise ValueError([*{str(n) for n in range(20)}])"
    first, second = sandbox.run_all([program] * 2)
    assert first == second


def test_no_programs_no_outcomes() -> None:
    assert sandbox.run_all([]) == []


@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"memory_bytes": 1 << 20}, {"processes": 0}, {"output_bytes": -1}]
)
def test_limits_that_no_program_fits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(limits))}: expected .* or more, found"):
        Limits(**limits)


def test_no_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="workers: expected 1 or more, found 0"):
        sandbox.run_all(["pass"], workers=0)


def test_isolation_is_said_in_words() -> None:
    assert re.match("(user, )?pid, mount, network|an unused uid, Landlock", sandbox.isolation())


# The attacks


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """The sandbox and its attacks where any user may read them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PACKAGE / "sandbox", folder / "pkt/sandbox")
        for file in ("__init__.py", "errors.py"):
            shutil.copy(PACKAGE / file, folder / "pkt")
        shutil.copy(sandbox_attacks.__file__, folder)
        (folder / "tmp").mkdir()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        (folder / "tmp").chmod(0o1777)
        yield folder


def public_python() -> str:
    """A Python that every user may run."""
    test = "import sys, ctypes; sys.exit(sys.version_info < (3, 11))"
    for python in (sandbox._interpreter()[0], "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            subprocess.run([python, "-I", "-c", test], user=ORDINARY, cwd="/", check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("every Python here is root's alone")


WAYS = {"as we are": "user", "namespaces by root": "root", "a uid": "uid", "as nobody": "user"}


@pytest.fixture(scope="module", params=WAYS)
def state(request: pytest.FixtureRequest, copy: Path) -> dict[str, Any]:
    """What became of the attacks, and of the world around them."""
    way = request.param
    ours = way == "as we are"
    if not ours and not ROOT:
        pytest.skip("needs root")
    python = sys.executable if ours else public_python()
    mode = sandbox._way()[0] if ours else WAYS[way]
    environment = {
        "PYTHONPATH": str(copy), "TMPDIR": str(copy / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"
    }  # fmt: skip
    done = subprocess.run(
        [python, "-s", copy / "sandbox_attacks.py", mode],
        env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=300,
        **({"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if way == "as nobody" else {}),
    )  # fmt: skip
    if done.returncode and not ours and "PktError: the sandbox cannot run" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(name: str, state: dict[str, Any]) -> None:
    passed, reason = state["outcomes"][name]
    assert re.search(ATTACKS[name].reason, reason)
    assert passed == (reason == "passed")


def test_the_world_around_the_attacks_is_as_it_was(state: dict[str, Any]) -> None:
    del state["outcomes"]
    assert state == {
        "connected": False,
        "victim ended": False,
        "outside": ["victim"],
        "victim file": "untouched",
        "processes left": [],
        "folders left": [],
    }


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_cheats_or_breaks_does_not_pass(name: str) -> None:
    outcome = sandbox.run(CHEATS[name].program, Limits(**CHEATS[name].limits))
    assert not outcome.passed
    assert re.search(CHEATS[name].reason, outcome.reason)
    assert len(outcome.reason.splitlines()) == 1


def test_memory_is_added_up_where_no_cgroup_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no cgroup has no memory.max, and none is created in it."""
    monkeypatch.setattr(cgroup, "_ROOT", str(tmp_path))
    places = [Path(place) for place, _ in cgroup._candidates()]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    assert cgroup.MemoryGroup.make(1 << 28) is None
    assert not [*tmp_path.rglob("pkt-*")]
    assert not [*tmp_path.rglob("memory.*")]
    script = "held = bytearray(b'x') * (64 << 20); print(flush=True); input()"
    with subprocess.Popen(
        ["sh", "-c", 'true; "$@"; true', "sh", sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout
        child.stdout.readline()
        assert 64 << 20 < cgroup.memory_of_descendants(os.getpid()) < 256 << 20
        child.communicate(b"\n")


# Ends and refusals


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def empty_groups() -> list[Path]:
    places = [Path(place) for place, _ in cgroup._candidates()]
    groups = [group for place in places for group in place.glob("pkt-*")]
    return [group for group in groups if not cgroup.read(str(group / "cgroup.procs"))]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_programs_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    mark = f"pkt{secrets.token_hex(5)}"
    program = f"import ctypes, time\nctypes.CDLL(None).prctl(15, {mark.encode()})\ntime.sleep(1000)"
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pkt import sandbox\n"
        f"sandbox.run_all([{program!r}] * 3, sandbox.Limits(seconds=1000), workers=2)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
    ) as parent:
        wait_until(lambda: len(processes(mark)) == 2 or parent.poll() is not None)
        parent.send_signal(how)
        _, errors = parent.communicate(timeout=60)
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    wait_until(lambda: not processes(mark))
    wait_until(lambda: not empty_groups())
    wait_until(lambda: not os.listdir(tmp_path))


def test_an_error_of_the_caller_ends_the_others() -> None:
    mark = f"pkt{secrets.token_hex(5)}"
    sleeper = f"import ctypes, time\nctypes.CDLL(None).prctl(15, {mark.encode()})\ntime.sleep(1000)"

    def refuse(phase: str, done: int, total: int) -> None:
        wait_until(lambda: processes(mark))
        raise KeyError(phase)

    with pytest.raises(KeyError, match="programs"):
        sandbox.run_all(["pass", sleeper, sleeper], Limits(seconds=1000), 2, refuse)
    assert not processes(mark)


REFUSED = """
import json, os
from pkt import sandbox
from pkt.errors import PktError
from pkt.sandbox import kernel

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

ids = f"1000 {os.getuid()} 1", f"1000 {os.getgid()} 1"
try:  # a user namespace in which no other may be made
    kernel.unshare(kernel.NEWUSER)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", ids[0])
    write("/proc/self/gid_map", ids[1])
    write("/proc/sys/user/max_user_namespaces", "0")
except OSError:
    assert os.getuid()  # the host itself allows none
kernel.drop_bounding_set()
kernel.drop_capabilities()
for ask in (sandbox.isolation, lambda: sandbox.run("pass")):
    try:
        ask()
    except PktError as error:
        print(json.dumps([error.message, error.hint, error.exit_code]))
"""


def test_a_host_that_isolates_nothing_is_refused_with_what_is_missing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, check=True
    )
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    message, hint, code = first
    assert first == second
    assert code == 1
    assert message.count("\n") == 0
    assert message.startswith("this host gives no isolation for programs written by a model: ")
    assert re.search("user, pid, mount, .*: unshare: ", message)
    assert re.search("an unused uid, Landlock: .*CAP_SETUID and CAP_SETGID are missing", message)
    assert re.search("sysctl -w|allow user namespaces", hint)


def test_the_remedy_names_the_setting_that_forbids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "knob").write_text("1\n")
    monkeypatch.setattr(sandbox, "_KNOBS", {str(tmp_path / "knob"): ("1", "0")})
    assert sandbox._remedy() == f"as root: sysctl -w {str(tmp_path / 'knob').replace('/', '.')}=0"
    (tmp_path / "knob").write_text("0\n")
    assert "allow user namespaces" in sandbox._remedy()


def test_a_launcher_that_dies_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.isolation()
    monkeypatch.setattr(sandbox, "_BOOT", "raise SystemExit('broken')")
    with pytest.raises(PktError, match="launcher ended with exit code 1: broken"):
        sandbox.run("pass")
