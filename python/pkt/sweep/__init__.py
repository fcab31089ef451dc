"""One decoder layer at a time: the teacher's gradients from two readings, its logits from one."""

from pkt.sweep.answers import answer_logits
from pkt.sweep.attribution import AttributionSweep
from pkt.sweep.names import boundary, kept_rows
from pkt.sweep.passes import Sweep
from pkt.sweep.resident import ResidentSweep
from pkt.sweep.roles import Observer, Source
from pkt.sweep.skeleton import Skeleton, attention_kinds, build_skeleton
from pkt.sweep.spool import DamagedError, Spool
from pkt.sweep.states import StatesSweep
from pkt.sweep.taps import RowsTap

__all__ = [
    "AttributionSweep",
    "DamagedError",
    "Observer",
    "ResidentSweep",
    "RowsTap",
    "Skeleton",
    "Source",
    "Spool",
    "StatesSweep",
    "Sweep",
    "answer_logits",
    "attention_kinds",
    "boundary",
    "build_skeleton",
    "kept_rows",
]
