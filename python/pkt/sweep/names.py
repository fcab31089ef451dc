"""Names of the files that a sweep leaves in its spool."""

from __future__ import annotations

TRIED = "together"  # which batches of seeds were tried, and how they did


def boundary(index: int) -> str:
    """Name of the spool file with the inputs of layer ``index``; the last one's are outputs."""
    return f"input-{index:05d}"


def upstream_of(index: int) -> str:
    """Name of the spool file with the gradients at the inputs of layer ``index``."""
    return f"upstream-{index:05d}"


def record_of(index: int) -> str:
    """Name of the spool's record of layer ``index``, swept backward."""
    return f"layer-{index:05d}"


def kept_rows(index: int) -> str:
    """Name of the spool file with some rows of boundary ``index``, or of what layer it is adds."""
    return f"rows-{index:05d}"
