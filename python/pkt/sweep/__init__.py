"""One decoder layer at a time: the teacher's gradients from two readings of its files."""

from pkt.sweep.passes import Observer, Source, Sweep
from pkt.sweep.skeleton import Skeleton, build_skeleton
from pkt.sweep.spool import Spool, disk_errors, durable

__all__ = [
    "Observer",
    "Skeleton",
    "Source",
    "Spool",
    "Sweep",
    "build_skeleton",
    "disk_errors",
    "durable",
]
