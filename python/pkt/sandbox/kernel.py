"""The calls to the Linux kernel that Python 3.11 has no names for, and the masks given to them.

Everything here acts on the calling process and raises `OSError`, which names the call.

Source: the manual pages unshare(2), mount(2), pivot_root(2), capabilities(7), seccomp(2),
landlock(7), and the system call tables of Linux 6.12.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterable

# clone(2), sched.h
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
# mount(2); each of the first four has the value that statvfs(2) reports
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
REMOUNT, NOATIME, NODIRATIME, BIND, REC, PRIVATE = 32, 1024, 2048, 4096, 16384, 1 << 18
RELATIME = 1 << 21
_STATVFS_RELATIME = 4096
_DETACH = 2  # umount2(2)
# prctl(2)
_PDEATHSIG, _SET_DUMPABLE, _SECCOMP, _CAPBSET_DROP = 1, 4, 22, 24
_CHILD_SUBREAPER, _NO_NEW_PRIVS = 36, 38
# capability.h: the numbers of the bits
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 5, 6, 7, 21

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    code: int = getattr(_libc, name)(*arguments)
    if code < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return code


def _long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def _prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    _call("prctl", ctypes.c_int(option), _long(value), pointer, _long(0), _long(0))


def unshare(flags: int) -> None:
    """Leave the namespaces named by the flags for new ones."""
    _call("unshare", ctypes.c_int(flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount; the error names the target."""
    given = (os.fsencode(source) if source else None, os.fsencode(target))
    try:
        _call("mount", *given, kind.encode() if kind else None, _long(flags), data.encode() or None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (on {target})") from None


def mount_flags(path: str) -> int:
    """Flags of the mount that holds a path, which a namespace of less privilege may not drop."""
    found = os.statvfs(path).f_flag
    kept = found & (RDONLY | NOSUID | NODEV | NOEXEC | NOATIME | NODIRATIME)
    return kept | (RELATIME if found & _STATVFS_RELATIME else 0)


def change_root(folder: str) -> None:
    """Make a mount point the root; the old root is no longer reachable."""
    os.chdir(folder)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", ctypes.c_int(_DETACH))
    os.chdir("/")


def die_with_parent(signal_number: int) -> None:
    """Ask for a signal when the parent ends; a later change of uid clears it."""
    _prctl(_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    _prctl(_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """No process without capabilities may trace this one or read its memory."""
    _prctl(_SET_DUMPABLE, 0)


def drop_bounding_set() -> None:
    """No program executed from here on gains a capability."""
    with contextlib.suppress(OSError):  # EINVAL: beyond the last capability of this kernel
        for capability in range(64):
            _prctl(_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Give up every capability and the way to new ones through set-uid files."""
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    _call("capset", header, bytes(24))
    _prctl(_NO_NEW_PRIVS, 1)


def capabilities() -> set[int]:
    """Numbers of the effective capabilities of this process."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return {number for number in range(64) if mask >> number & 1}


# System calls that a test of an algorithm has no use for, with their numbers on x86-64 and arm64:
# sockets, other processes' memory, namespaces and mounts, memory that no address space shows, keys,
# and interfaces that are the kernel's weak places.
_DENIED = {
    "socket": (41, 198), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
}  # fmt: skip
# By `platform.machine`: place in the pairs above, AUDIT_ARCH of seccomp(2), number of clone.
_PROCESSORS = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
_CLONE3 = 435  # its flags lie behind a pointer: refused as unknown, and libc falls back to clone
_NEW_ANY = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38


def can_filter() -> bool:
    """Whether the system call numbers of this processor are known here."""
    return platform.machine() in _PROCESSORS


def filter_system_calls() -> None:
    """From here on the calls of `_DENIED` fail with EPERM; needs no capability."""
    place, architecture, clone = _PROCESSORS[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, _KILL),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, _ERRNO | _ENOSYS),
        (equal, 0, 1, _CLONE3), (give, 0, 0, _ERRNO | _ENOSYS),
    ]  # fmt: skip
    for numbers in _DENIED.values():
        steps += [(equal, 0, 1, numbers[place]), (give, 0, 0, _ERRNO | _EPERM)]
    steps += [
        (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, _NEW_ANY),
        (give, 0, 0, _ERRNO | _EPERM), (give, 0, 0, _ALLOW),
    ]  # fmt: skip
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(held))
    _prctl(_SECCOMP, 2, program)


_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_READ = 0b1101  # execute, read a file, list a folder
_LANDLOCK_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # what a plain file may be given


def landlock_version() -> int:
    """Version of the kernel's Landlock, 0 where it has none."""
    try:
        return _call("syscall", ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1)
    except OSError:
        return 0


def confine_files(readable: Iterable[str], writable: str) -> None:
    """From here on only these folders and files can be opened, and only the last one written to.

    Needs Landlock version 3 and no new privileges; paths that do not exist are passed over.
    """
    bits = 16 if landlock_version() >= 5 else 15
    everything = (1 << bits) - 1
    handled = struct.pack("=Q", everything)
    rules = _call("syscall", ctypes.c_long(_LANDLOCK_CREATE), handled, ctypes.c_size_t(8), 0)
    for path in (*readable, writable):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = everything if path == writable else _LANDLOCK_READ
        if path == os.devnull:
            allowed = everything
        if not os.path.isdir(path):
            allowed &= _LANDLOCK_FILE
        rule = struct.pack("=Qi", allowed, place)
        _call("syscall", ctypes.c_long(_LANDLOCK_ADD), rules, 1, rule, 0)
        os.close(place)
    _call("syscall", ctypes.c_long(_LANDLOCK_RESTRICT), rules, 0)
    os.close(rules)
