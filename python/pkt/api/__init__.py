"""What the commands of these names do, as functions: one module a command, none of which prints."""

from pkt.api.aligning import (
    TOP_K,
    execute_targets,
    finished_targets,
    prepare_targets,
    write_targets,
)
from pkt.api.alignment import Aligning, align, beside, prepare_align
from pkt.api.device import check_device, free_device_bytes, require_device_fit
from pkt.api.evaluating import (
    data_formats,
    evaluate,
    execute_evaluation,
    prepare_evaluation,
)
from pkt.api.exporting import execute_export, export, finished_export, prepare_export
from pkt.api.extracting import execute, extract, prepare
from pkt.api.fitting import reading, require_fit
from pkt.api.inspecting import inspect
from pkt.api.online import require_both_fit
from pkt.api.pair_quality import (
    align_quality,
    execute_quality,
    prepare_quality,
    require_quality_fit,
)
from pkt.api.showing import continuations, write_overview
from pkt.api.training import execute_training, pick_device, prepare_training, train

__all__ = [
    "TOP_K",
    "Aligning",
    "align",
    "align_quality",
    "beside",
    "check_device",
    "continuations",
    "data_formats",
    "evaluate",
    "execute",
    "execute_evaluation",
    "execute_export",
    "execute_quality",
    "execute_targets",
    "execute_training",
    "export",
    "extract",
    "finished_export",
    "finished_targets",
    "free_device_bytes",
    "inspect",
    "pick_device",
    "prepare",
    "prepare_align",
    "prepare_evaluation",
    "prepare_export",
    "prepare_quality",
    "prepare_targets",
    "prepare_training",
    "reading",
    "require_both_fit",
    "require_device_fit",
    "require_fit",
    "require_quality_fit",
    "train",
    "write_overview",
    "write_targets",
]
