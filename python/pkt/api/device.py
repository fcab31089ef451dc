"""Whether there is a device, and the memory that a plan counts for it: asked before any reading."""

from __future__ import annotations

from pkt.config import format_bytes
from pkt.errors import BudgetError, UsageError
from pkt.records import Plan


def check_device(device: str) -> None:
    """Raise `UsageError` for a device this host does not have."""
    if device != "cpu":
        import torch

        if device.split(":")[0] != "cuda" or not torch.cuda.is_available():
            raise UsageError(f"--device {device}: not available here", "use --device cpu")


def require_device_fit(plan: Plan, free_bytes: int | None) -> None:
    """Raise `BudgetError` if the plan needs more of a device than is free; ``None``: no device."""
    if free_bytes is None or plan.device_bytes <= free_bytes:
        return
    largest = sorted(plan.device_parts, key=lambda part: -part.bytes)[:3]
    listed = ", ".join(f"{part.name} {format_bytes(part.bytes)}" for part in largest)
    raise BudgetError(
        f"--device cuda: this run holds {format_bytes(plan.device_bytes)} of the device's memory "
        f"at its peak ({listed}); {format_bytes(free_bytes)} are free",
        "end what else runs there, take shorter seeds (--max-tokens), or use --device cpu",
    )


def free_device_bytes(device: str) -> int | None:
    """What a CUDA device has free, this process's context taken off; ``None`` for the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])
