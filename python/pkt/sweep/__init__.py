"""One decoder layer at a time: the teacher's gradients from two readings, its logits from one."""

from pkt.sweep.answers import answer_logits
from pkt.sweep.passes import Observer, Source, Sweep, boundary
from pkt.sweep.skeleton import Skeleton, build_skeleton
from pkt.sweep.spool import Spool, disk_errors, durable
from pkt.sweep.states import StatesSweep

__all__ = [
    "Observer",
    "Skeleton",
    "Source",
    "Spool",
    "StatesSweep",
    "Sweep",
    "answer_logits",
    "boundary",
    "build_skeleton",
    "disk_errors",
    "durable",
]
