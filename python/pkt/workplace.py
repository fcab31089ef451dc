"""Where the work of a run lies: in ``OUT/.work``, its large files perhaps on another disk.

With ``--spool-dir DIR`` they lie in a folder of the run's own in DIR, whose name is drawn at random
and noted in ``OUT/.work``, so that runs which share DIR never meet. What both hold belongs to the
same run or is made again: a DIR that was emptied costs time, never correctness.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path

from pkt.errors import OutputError
from pkt.records import Room

WORK = ".work"
_NOTE = "spool.json"  # in OUT/.work: the folder in DIR
_OWNER = "owner.json"  # in that folder: OUT


def spool_folder(work: Path, spool_dir: Path | None) -> Path:
    """The folder of a run's large files, which exists afterwards.

    One that the run had elsewhere is removed: its files are made again.

    Args:
        work: ``OUT/.work``, locked by this process.
        spool_dir: DIR, made if need be; ``None``: they lie in ``OUT/.work``.

    Raises:
        OutputError: DIR cannot be used.

    """
    inside, noted = work / "spool", _noted(work)
    parent = None if spool_dir is None else spool_dir.resolve()
    if noted and (noted.parent != parent or not _owned(noted, work)):
        drop_spool(work)
        noted = None
    if parent is None:
        folder = inside
    else:
        if not noted:
            for path in (*inside.glob("*.bin"), *inside.glob("*.sum.json")):
                path.unlink()
        folder = noted or parent / f"pkt-{secrets.token_hex(8)}"
        _write(work / _NOTE, {"folder": str(folder)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if parent is not None:
            _write(folder / _OWNER, {"output_dir": str(work.parent.resolve())})
    except OSError as error:
        raise OutputError(
            f"--spool-dir {spool_dir}: cannot be used: {error.strerror or error}",
            "name a folder on a disk with room, or leave the option out",
        ) from error
    return folder


def spooled(work: Path) -> Path:
    """The folder of the large files of a run as it stands; it need not exist."""
    return _noted(work) or work / "spool"


def drop_spool(work: Path) -> None:
    """Remove what a run has outside of ``OUT/.work``."""
    noted = _noted(work)
    if noted and _owned(noted, work):
        shutil.rmtree(noted, ignore_errors=True)
    (work / _NOTE).unlink(missing_ok=True)


def room(output_dir: Path, spool_dir: Path | None) -> Room:
    """What the disks under ``output_dir`` and ``spool_dir`` have free for this run.

    What an unfinished run holds there already counts as free: its files are used again.
    """
    work = output_dir / WORK
    noted = _noted(work)
    held = {work: _size(work)}
    if noted and _owned(noted, work):
        held[noted] = _size(noted)
    given = output_dir if spool_dir is None else spool_dir

    def free(place: Path) -> int:
        device = _device(place)
        ours = sum(size for folder, size in held.items() if _device(folder) == device)
        return shutil.disk_usage(_existing(place)).free + ours

    return Room(
        output_dir=str(output_dir),
        output_free=free(output_dir),
        spool_dir=None if spool_dir is None else str(spool_dir),
        spool_free=free(given),
        shared=_device(given) == _device(output_dir),
    )


def _noted(work: Path) -> Path | None:
    """The folder that the run has outside, if its note is sound."""
    try:
        folder = Path(json.loads((work / _NOTE).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    named = folder.is_absolute() and re.fullmatch(r"pkt-[0-9a-f]{16}", folder.name)
    return folder if named else None


def _owned(folder: Path, work: Path) -> bool:
    """Whether it is this run's and not that of a run whose OUT has been copied to here."""
    try:
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))["output_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return not folder.exists() or not any(folder.iterdir())
    return bool(owner == str(work.parent.resolve()))


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
    """Bytes on the disk below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(os.stat(path).st_blocks * 512 for path in files)
