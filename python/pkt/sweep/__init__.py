"""One decoder layer at a time: the teacher's gradients from two readings, its logits from one."""

from pkt.sweep.answers import answer_logits
from pkt.sweep.passes import Observer, Source, Sweep
from pkt.sweep.skeleton import Skeleton, build_skeleton
from pkt.sweep.spool import Spool, disk_errors, durable

__all__ = [
    "Observer",
    "Skeleton",
    "Source",
    "Spool",
    "Sweep",
    "answer_logits",
    "build_skeleton",
    "disk_errors",
    "durable",
]
