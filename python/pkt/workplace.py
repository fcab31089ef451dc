"""Where the work of a run lies: in ``OUT/.work``, its large files perhaps on another disk.

With ``--spool-dir DIR`` the tensor files of a spool lie in a folder of its own in DIR, whose name
is drawn at random and noted in the spool, so that runs which share DIR never meet. What both hold
belongs to the same run or is made again: a DIR that was emptied costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from pkt.errors import OutputError
from pkt.host import in_memory
from pkt.records import Room

WORK = ".work"
_NOTE = "elsewhere.json"  # in the spool: the folder in DIR
_OWNER = "owner.json"  # in that folder: the spool
_UNKNOWN = 1 << 60  # free on a file system that does not say: writing will tell


def tensor_folder(spool: Path, spool_dir: Path | None) -> Path:
    """The folder of a spool's tensor files, which exists afterwards.

    One that the spool had elsewhere is removed: its files are made again.

    Args:
        spool: the folder of one process in ``OUT/.work``, which exists and is locked.
        spool_dir: DIR, made if need be; ``None``: they lie in the spool itself.

    Raises:
        OutputError: DIR cannot be used.

    """
    noted = _noted(spool)
    parent = None if spool_dir is None else spool_dir.resolve()
    if noted and (noted.parent != parent or not _owned(noted, spool)):
        drop_tensors(spool)
        noted = None
    if parent is None:
        return spool
    if not noted:
        for path in (*spool.glob("*.bin"), *spool.glob("*.sum.json")):
            path.unlink()
    folder = noted or parent / f"pkt-{secrets.token_hex(8)}"
    _write(spool / _NOTE, {"folder": str(folder)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _OWNER, {"spool": str(spool.resolve())})
    except OSError as error:
        raise OutputError(
            f"--spool-dir {spool_dir}: cannot be used: {error.strerror or error}",
            "name a folder on a disk with room, or leave the option out",
        ) from error
    return folder


def tensors_of(spool: Path) -> Path:
    """The folder of a spool's tensor files as it stands; it need not exist."""
    return _noted(spool) or spool


def drop_tensors(folder: Path) -> None:
    """Remove what the spools in ``folder`` have outside of it."""
    for spool, noted in _elsewhere(folder):
        if _owned(noted, spool):
            shutil.rmtree(noted, ignore_errors=True)
        (spool / _NOTE).unlink(missing_ok=True)


def drop_folder(noted: Path, spool: Path) -> None:
    """Remove what `tensors_of` a spool lie elsewhere, if the note that named it has gone before."""
    if noted != spool and _owned(noted, spool):
        shutil.rmtree(noted, ignore_errors=True)


def room(output_dir: Path, spool_dir: Path | None, sharing: int = 1) -> Room:
    """What the disks under ``output_dir`` and ``spool_dir`` have free for this run.

    What an unfinished run holds there already counts as free: its files are used again. ``sharing``
    of the run's processes are on this host.
    """
    work = output_dir / WORK
    held = {work: _size(work)}
    held |= {noted: _size(noted) for spool, noted in _elsewhere(work) if _owned(noted, spool)}
    given = output_dir if spool_dir is None else spool_dir

    def ours(place: Path) -> int:
        device = _device(place)
        return sum(size for folder, size in held.items() if _device(folder) == device)

    def free(place: Path) -> int:
        return free_bytes(place) + ours(place)

    return Room(
        output_dir=str(output_dir),
        output_free=free(output_dir),
        spool_dir=None if spool_dir is None else str(spool_dir),
        spool_free=free(given),
        shared=_device(given) == _device(output_dir),
        spool_in_memory=in_memory(_existing(given)),
        spool_held=ours(given),
        sharing=sharing,
    )


def free_bytes(place: Path) -> int:
    """What the disk under ``place``, which need not be there yet, has free."""
    usage = shutil.disk_usage(_existing(place))
    return usage.free if usage.total else _UNKNOWN


def _elsewhere(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The spools in ``folder`` that have tensor files elsewhere, and where."""
    for note in _files(folder):
        if note.name == _NOTE and (noted := _noted(note.parent)):
            yield note.parent, noted


def _noted(spool: Path) -> Path | None:
    """The folder that a spool has elsewhere, if its note is sound."""
    try:
        folder = Path(json.loads((spool / _NOTE).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    named = folder.is_absolute() and re.fullmatch(r"pkt-[0-9a-f]{16}", folder.name)
    return folder if named else None


def _owned(folder: Path, spool: Path) -> bool:
    """Whether it is this spool's and not that of one which was copied to here."""
    try:
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))["spool"]
    except (OSError, ValueError, KeyError, TypeError):
        return not folder.exists() or not any(folder.iterdir())
    return bool(owner == str(spool.resolve()))


def _write(path: Path, value: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _size(folder: Path) -> int:
    """Bytes on the disk below ``folder``, where a run may be writing and removing just now."""
    size = 0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            size += path.lstat().st_blocks * 512
    return size


def _files(folder: Path) -> list[Path]:
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(found)
