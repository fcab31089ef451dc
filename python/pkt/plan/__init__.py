"""What a run will hold, read and write, worked out from headers before anything is read."""

from pkt.plan.extraction import make_plan
from pkt.plan.forward import make_align_plan, make_forward_plan

__all__ = ["make_align_plan", "make_forward_plan", "make_plan"]
