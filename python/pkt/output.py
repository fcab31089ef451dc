"""A run is a folder: refused, locked, continued, finished.

Until the end everything lies in ``OUT/.work``, beside the identity of the run (hashes of models
and data, options that change the result). The same command finds it and continues; a changed
input is refused by name. Results appear whole: written in the work folder, then renamed, the
manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt.durable import read_record, write_record
from pkt.errors import IncompatibleError, OutputError
from pkt.workplace import WORK, drop_tensors

MANIFEST = "pkt_manifest.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md", "report")
TUNED = (*ADAPTER, "metrics.jsonl")
#: What unfinished work depends on, and a result need not name.
_OF_WORK = ("device", "processes", "weights")
_PUBLISHING = "publishing"  # in the work folder: from here on some of OUT's files are ours
_REPLACED = "replaced.json"  # in the work folder: the manifest of what --overwrite removes
#: Whatever any command leaves in its OUT; a manifest may name more under "files".
_OURS = (
    *TUNED, "results.json", "results.md", "details", "targets", "pkt_run.json",
    MANIFEST, WORK,
)  # fmt: skip


def finished(
    folder: Path, identity: Mapping[str, Any], results: Sequence[str] = ADAPTER
) -> dict[str, Any] | None:
    """The manifest in ``folder`` if it is of this very run and every result is there."""
    if any(not (folder / name).exists() for name in (*results, "pkt_run.json", MANIFEST)):
        return None
    if not _is_json(folder / "pkt_run.json"):
        return None
    if not all(_is_whole(folder / name) for name in results if name.endswith(".safetensors")):
        return None
    manifest = _manifest_of(folder, identity)
    if manifest is not None and (folder / WORK).is_dir():  # killed while it was cleaning up:
        drop_tensors(folder / WORK)  # the manifest is written last
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest


def _manifest_of(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = json.loads(json.dumps(identity))
    same = isinstance(manifest, dict) and all(
        manifest.get(key) == value
        for key, value in wanted.items()
        if key in manifest or key not in _OF_WORK
    )
    return manifest if same else None


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, path.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        return bool(path.stat().st_size == 8 + size + max(ends, default=0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


@contextlib.contextmanager
def run_folder(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """The work folder of a run, locked against a second process while the block runs.

    Args:
        folder: OUT.
        identity: what makes this run this run, JSON-able.
        overwrite: remove what another run of pkt left there; other files are never touched, and
            this very run, if unfinished, is continued.

    Raises:
        OutputError: OUT holds something else, is another run's, in use, or not writable.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be the output folder: {error.strerror}") from error
    work = folder / WORK
    if work.is_symlink():
        raise OutputError(
            f"{work}: expected a folder, found a link",
            "remove it; --spool-dir puts large files on another disk",
        )
    found = [name for name in found if name != WORK]
    if found and not (work / "run.json").is_file():
        ours = _written(folder)
        foreign = [name for name in found if name not in ours]
        if foreign or not (overwrite or _manifest_of(folder, identity)):
            extra = " (--overwrite removes only what pkt wrote)" if overwrite else ""
            raise OutputError(
                f"{folder}: expected an empty folder or this run's own, found "
                f"{', '.join((foreign or found)[:3])}{extra}",
                "choose another -o" + ("" if foreign else ", or add --overwrite"),
            )
    continued = False
    try:
        work.mkdir(exist_ok=True)
        with locked(work):
            continued = _claim(folder, work, identity, overwrite)
            yield work
        with contextlib.suppress(OSError):  # a network's disk keeps what was open in it until now
            work.rmdir()
    except IncompatibleError:  # a family that cannot be swept: nothing here is worth keeping
        if not continued:
            drop_tensors(work)
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{folder}: the disk is full; what is finished is kept in {work}",
                "make room, then run the same command again: it continues where it stopped",
            ) from error
        raise OutputError(f"{folder}: cannot write: {error.strerror or error}") from error


def publish(folder: Path, staged: Path, files: Mapping[str, str]) -> None:
    """Move staged results into OUT, then texts, the manifest last, and drop the work folder."""
    (folder / WORK / _PUBLISHING).touch()
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in sorted(staged.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    for name, text in sorted(files.items(), key=lambda item: item[0] == MANIFEST):
        temporary = folder / WORK / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / name)
    drop_tensors(folder / WORK)
    shutil.rmtree(folder / WORK, ignore_errors=True)  # a network's disk has the lock still open


def _claim(folder: Path, work: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Make the work folder that of this run; whether it was so already."""
    state = work / "run.json"
    wanted = json.loads(json.dumps(identity))
    held = read_record(state)
    if held == wanted:
        return True
    if state.exists() and not overwrite:
        if held is None:
            raise OutputError(
                f"{folder}: an unfinished run is there; {state}, which says of what, is damaged",
                "choose another -o, or add --overwrite to begin anew",
            )
        raise OutputError(
            f"{folder}: an unfinished run with other inputs is there; changed: "
            f"{', '.join(differences(held, wanted))}",
            "repeat its command to continue it, choose another -o, or add --overwrite",
        )
    drop_tensors(work)
    if overwrite:
        names = _written(folder)
        if (folder / MANIFEST).is_file():  # first: without it nothing is finished
            (folder / MANIFEST).rename(work / _REPLACED)  # and it says what else is ours
        for name in names:
            path = folder / name
            if name != WORK and path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What says whose the rest is goes last: a kill leaves nothing that another run could take up.
    for path in sorted(work.iterdir(), key=lambda path: (path == state, path.name == _REPLACED)):
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_record(state, wanted)
    return False


def _written(folder: Path) -> list[str]:
    """Names that a command of pkt has written into ``folder``.

    None but the work folder where no file says that it was pkt: a README.md is anybody's.
    """
    signs = (MANIFEST, "pkt_run.json", f"{WORK}/{_PUBLISHING}", f"{WORK}/{_REPLACED}")
    if not any((folder / name).is_file() for name in signs):
        return [WORK]
    listed: list[str] = []
    for place in (folder / MANIFEST, folder / WORK / _REPLACED):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            manifest = json.loads(place.read_text(encoding="utf-8"))
            listed += [str(name) for name in manifest.get("files", []) if "/" not in str(name)]
    return [name for name in dict.fromkeys((*_OURS, *listed)) if name not in (".", "..")]


def differences(held: Any, wanted: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ."""
    if not isinstance(held, dict) or not isinstance(wanted, dict):
        return [] if held == wanted else [path.removeprefix(".") or "everything"]
    found = []
    for key in sorted({*held, *wanted}):
        found += differences(held.get(key), wanted.get(key), f"{path}.{key}")
    return found


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold ``work`` against other processes.

    By an flock: the kernel drops it with the process, so no stale lock can remain.
    """
    with (work / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise OutputError(
                f"{work.parent}: in use by another pkt ({holder})",
                "wait for it, or choose another -o",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def spool_folder(work: Path, process: int, processes: int) -> Path:
    """Where one of the processes of a run keeps what its sweep leaves."""
    return work / "spool" / f"rank-{process}" if processes > 1 else work / "spool"


def as_json(value: Any) -> str:
    """One field a line."""
    return json.dumps(value, indent=1) + "\n"


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
