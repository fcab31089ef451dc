"""Whether a planned run fits memory and disks, and how it will read."""

from __future__ import annotations

from typing import Protocol

from pkt.api.choices import require_choice
from pkt.config import MIB, format_bytes
from pkt.errors import BudgetError
from pkt.host import memory_limit
from pkt.models import Model
from pkt.records import IoMode, Plan, Reading, Select


class HasPlan(Protocol):
    """A prepared run that streams a teacher."""

    @property
    def teacher(self) -> Model:
        """The model that is read."""

    @property
    def plan(self) -> Plan:
        """What the run holds, reads and writes."""


def reading(
    task: HasPlan, io: IoMode = "auto", *, measured: bool = True, processes_here: int = 1
) -> Reading:
    """The reading mode of a run: as asked, or chosen by a short measurement of the files.

    Without ``measured`` no file is read, and the mode stays "auto" where that would decide. The
    ``processes_here`` of this host each hold what the plan says.
    """
    from pkt.disk import choose_io

    require_choice("io", io, IoMode)
    if io != "auto":
        return Reading(io, f"--io {io}")
    left = memory_limit()[0] - processes_here * task.plan.peak_bytes
    return choose_io(task.teacher.checkpoint, task.plan, left, measured=measured)


def require_fit(plan: Plan) -> None:
    """Raise `BudgetError` with the smallest setting unless the plan fits memory and disks."""
    if not plan.fits:
        raise BudgetError(
            f"this run holds {format_bytes(plan.peak_bytes)} at its peak; {plan.budget_source} "
            f"allows {format_bytes(plan.budget_bytes)}",
            f"the smallest setting that fits is --max-ram {plan.smallest_bytes // MIB}MiB",
        )
    for disk in plan.disks:
        if disk.bytes > disk.free_bytes:
            raise BudgetError(
                f"{disk.folder}: this run writes {format_bytes(disk.bytes)} there"
                + (f" (--spool-every {plan.spool_every})" if plan.extracts else "")
                + f", and its disk has {format_bytes(disk.free_bytes)} free",
                _more_room(plan),
            )


def _more_room(plan: Plan) -> str:
    """What makes a spool fit that does not."""
    every, least = plan.least_spool
    assert plan.room is not None
    others = plan.disks[0].bytes - plan.spool_bytes  # on the disk of the spool
    if not plan.extracts:
        return (
            "make room, name another disk with --spool-dir, or take fewer or shorter examples "
            "(--max-examples, --max-tokens)"
        )
    if least + others <= plan.room.spool_free and plan.spool_bytes > least:
        return f"--spool-every {every} needs {format_bytes(least + others)}"
    return (
        f"the least is {format_bytes(least + others)}, with --spool-every {every}: make room, name "
        "another disk with --spool-dir, or take fewer or shorter seeds (--limit, --max-tokens)"
    )


def kept_records(select: Select) -> dict[str, bool]:
    """What a strategy keeps of every layer and reads of its windows, for the plan."""
    return {
        "masks": select in ("top-weights", "random-weights"),
        "crossed": select in ("rows-cols", "consistent"),
        "sums": select == "consistent",
    }
