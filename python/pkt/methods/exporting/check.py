"""Loaded back: the written model computes what student and adapter do, as plain PEFT has them.

Where memory holds the student in float32, logits are compared; where it does not, the files are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.adapter import product_norm, read_adapter, side_by_side
from pkt.errors import PktError
from pkt.methods.exporting.task import Task
from pkt.records import LowRank

BOUND = 1e-4  # of max |Δlogit| in float32, times the largest logit where that is above 1
TOKENS = 16
_LOADING_BYTES = 1 << 30  # torch, transformers, activations


@dataclass(frozen=True, slots=True)
class Check:
    """What was compared, and what came of it."""

    compared: str  #: "logits" or "files"
    difference: float  #: max |Δlogit|; of files max ‖Δ' − Δ‖ / ‖Δ‖
    bound: float | None  #: None where the export was asked to lose something


def fits(task: Task) -> bool:
    """Whether the student in float32 fits the memory that the export may hold."""
    checkpoint = task.student.checkpoint
    pieces = [*checkpoint.outer.values(), *(p for la in checkpoint.layers for p in la.values())]
    held = 4 * sum(piece.elements for piece in pieces)
    return held + held // 4 + _LOADING_BYTES <= task.budget_bytes


def compare_logits(task: Task, folder: Path, exact: bool) -> Check:
    """Compare the logits of a few tokens; the two models are in memory one after the other.

    Raises:
        PktError: they differ although nothing was to be lost.

    """
    with _quiet():
        wanted = _logits(_reference(task), task)
        found = _logits(_exported(task, folder), task)
    difference = float((wanted - found).abs().max())
    bound = BOUND * max(1.0, float(wanted.abs().max())) if exact else None
    check = Check("logits", difference, bound)
    if bound is not None and not difference <= bound:
        raise PktError(
            f"{folder}: loaded back, its logits differ from student and adapter by "
            f"{difference:.3g}; expected at most {bound:.3g}",
            "please report it, with the versions that `pkt env` prints",
        )
    return check


def compare_factors(task: Task, folder: Path, exact: bool) -> Check:
    """Compare the products of the written factors with the changes they stand for.

    Raises:
        PktError: they differ although nothing was to be lost.

    """
    written, changes = read_adapter(folder).factors, task.changes()
    if written.keys() != changes.keys():
        raise PktError(f"{folder}: loaded back, its modules are not those of {task.adapter.folder}")
    worst = 0.0
    for name, difference in side_by_side(written, changes).items():
        norm = product_norm(changes[name])
        worst = max(worst, product_norm(difference) / norm if norm else product_norm(difference))
    bound = 1e-6 if exact else None
    if bound is not None and not worst <= bound:
        raise PktError(f"{folder}: loaded back, its products differ by {worst:.3g} of their norm")
    return Check("files", worst, bound)


def _reference(task: Task) -> Any:
    """What the export stands for, by PEFT alone; of a residual base, the student itself."""
    from peft import PeftModel

    model = _load(task.student.folder)
    if task.to == "residual":
        return model
    if task.start is not None:
        if task.architecture.parts(task.start.factors):
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
        with torch.no_grad():
            for name, half in task.start.factors.items():
                _subtract(model.get_submodule(name), half)
    return PeftModel.from_pretrained(model, str(task.adapter.folder))


def _exported(task: Task, folder: Path) -> Any:
    from peft import PeftModel

    if task.to == "merged":
        return _load(folder)
    if task.to == "residual":
        return PeftModel.from_pretrained(_load(folder / "base"), str(folder / "adapter"))
    return PeftModel.from_pretrained(_load(task.student.folder), str(folder))


def _subtract(module: Any, half: LowRank) -> None:
    product = half.b @ half.a
    module.weight -= product.T if isinstance(module, nn.Embedding) else product


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if found["missing_keys"]:
        raise PktError(f"{folder}: loaded, it lacks the weight '{min(found['missing_keys'])}'")
    return model


@torch.no_grad()
def _logits(model: Any, task: Task) -> torch.Tensor:
    """Logits (tokens, V) of tokens spread over the vocabulary."""
    rows = task.student.embedding.shape[0]
    ids = torch.tensor([[(1 + 7919 * i) % rows for i in range(TOKENS)]])
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT on tied embeddings: what it warns of, a merge, is not done here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
