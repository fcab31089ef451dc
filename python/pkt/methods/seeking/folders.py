"""Where the processes of a run keep their unfinished work.

The first one claims OUT as any run does. Each of the others has a spool at the same path under
OUT, on the same disk or on that of its own host, bound to the same inputs; when the result has been
published it removes what the first could not reach.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pkt.durable import disk_errors, read_record, write_record
from pkt.errors import UsageError
from pkt.output import differences, locked, run_folder, spool_folder
from pkt.processes import from_first, index, is_first, wait_for_all
from pkt.workplace import WORK, drop_folder, drop_tensors, tensors_of


@contextlib.contextmanager
def shared_folder(
    folder: Path, identity: Mapping[str, Any], overwrite: bool, processes: int
) -> Iterator[tuple[Path, Path]]:
    """The work folder of a run, and in it the spool of this process.

    Args:
        folder: OUT.
        identity: what makes this run this run, JSON-able.
        overwrite: as in `run_folder`.
        processes: of the run.

    Raises:
        OutputError: OUT is refused or cannot be written.
        UsageError: this process was given other inputs than the first.

    """
    work = folder / WORK
    spool = spool_folder(work, index(), processes)
    # On a shared disk the first one removes notes of folders that only this host can reach: they
    # are read before it may begin.
    before = tensors_of(spool)
    if processes > 1:
        identity = {**identity, "processes": processes}  # each holds a share of the seeds
        wait_for_all()
        # When files were written is each host's own.
        _require_same({key: value for key, value in identity.items() if key != "weights"})
    if is_first():
        with run_folder(folder, identity, overwrite) as work:
            wait_for_all()
            spool.mkdir(parents=True, exist_ok=True)
            yield work, spool
        return
    wait_for_all()
    with disk_errors(spool):
        spool.mkdir(parents=True, exist_ok=True)
    with locked(spool):
        if tensors_of(spool) != before:
            drop_folder(before, spool)
        _bind(spool, identity)
        yield work, spool
    drop_tensors(spool)
    shutil.rmtree(spool, ignore_errors=True)
    for parent in (spool.parent, work, folder):
        with contextlib.suppress(OSError):  # not empty: the first process wrote there
            parent.rmdir()


def _require_same(identity: Mapping[str, Any]) -> None:
    ours = json.dumps(identity)
    theirs = from_first(ours)
    if changed := differences(json.loads(theirs), json.loads(ours)):
        raise UsageError(
            f"process {index()} has other inputs than process 0: {', '.join(changed)}",
            "give every host the same models, seeds, options and version of pkt",
        )


def _bind(spool: Path, identity: Mapping[str, Any]) -> None:
    """Keep what is there if it is of this very run; OUT has decided whether it may go."""
    state = spool / "run.json"
    if read_record(state) == json.loads(json.dumps(identity)):
        return
    with disk_errors(spool):
        drop_tensors(spool)
        for path in sorted(spool.iterdir(), key=lambda path: path == state):
            if path.name != "lock":
                path.unlink()
    write_record(state, identity)
