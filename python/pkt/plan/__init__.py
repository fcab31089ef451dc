"""What a run will hold, read and write, worked out from headers before anything is read."""

from pkt.plan.extraction import make_plan
from pkt.plan.forward import make_align_plan, make_forward_plan
from pkt.plan.resident import make_resident_plan
from pkt.plan.states import Attributed, Fitted, Mapped, make_targets_plan

__all__ = [
    "Attributed",
    "Fitted",
    "Mapped",
    "make_align_plan",
    "make_forward_plan",
    "make_plan",
    "make_resident_plan",
    "make_targets_plan",
]
