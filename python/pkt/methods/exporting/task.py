"""What an export is asked to do: its options, and its opened inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pkt
from pkt.adapter import Adapter, side_by_side
from pkt.methods.exporting.modules import Architecture, Place
from pkt.models import Model
from pkt.records import LowRank

Form = Literal["lora", "merged", "residual"]


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that an export needs, opened and found to fit."""

    to: Form
    adapter: Adapter
    start: Adapter | None  #: what the adapter's base had subtracted; of "residual", the adapter
    student: Model
    architecture: Architecture
    places: Mapping[str, Place]  #: of every changed module
    rank: int | None  #: to recompress to
    dtype: str | None  #: of the written weights: "F32", "BF16", "F16"; None: as stored
    base_model: str  #: the student as the user named it
    budget_bytes: int  #: what may be held to check the result

    def changes(self) -> dict[str, LowRank]:
        """What is added to the untouched student, by module: BA, BA − B₀A₀, or −B₀A₀."""
        if self.to == "residual":
            return side_by_side({}, self.adapter.factors)
        return side_by_side(self.adapter.factors, self.start.factors if self.start else {})

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: the manifest without what it found."""
        return {
            "format": 1,
            "pkt": pkt.__version__,
            "method": "exporting",
            "to": self.to,
            "student": self.student.hashes(),
            "adapter_sha256": self.adapter.sha256,
            "start_sha256": self.start.sha256 if self.start else None,
            "options": {"rank": self.rank, "dtype": self.dtype},
        }
