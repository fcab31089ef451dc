"""The student in memory, the modules that are adapted, and the start that they begin from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import CheckpointError, IncompatibleError
from pkt.methods.tuning.starts import Halves, gaussian, halves, leading, ordinary, principal
from pkt.methods.tuning.task import Task
from pkt.projections import wanted_modules
from pkt.records import LowRank

_LAYER = re.compile(r"^.+?\.(?P<index>\d+)\.(?P<suffix>.+)$")


def load_student(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole student, in ``dtype`` on ``device``.

    Raises:
        CheckpointError: transformers cannot load it, or left a weight unset.

    """
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from error
    if found["missing_keys"]:
        raise CheckpointError(f"{folder}: it lacks the weight '{min(found['missing_keys'])}'")
    model.config.use_cache = False
    return model.to(device)


def begin(task: Task, model: Any) -> Halves:
    """The start of ``task``, made of its extraction or of the student itself.

    Raises:
        IncompatibleError: the extraction names modules or shapes that the student does not have.

    """
    config, seed = task.config, task.config.schedule.seed
    if task.start is not None:
        _require_same(task.start, model, task.base_model)
        return halves(leading(task.start, config.rank), config.form)
    weights = {name: _weight(model, name) for name in _modules(task, model)}
    if config.init == "lora":
        return ordinary(
            {n: (w.shape[0], w.shape[1]) for n, w in weights.items()}, config.rank, seed
        )
    norms = task.norms.__getitem__ if task.norms is not None else None
    if task.norms is not None and (lacking := weights.keys() - task.norms.keys()):
        raise IncompatibleError(
            f"--norms-from: the extraction has no module '{min(lacking)}'",
            "extract with the same --targets and --embeddings",
        )
    if config.init == "pissa":
        return halves(principal(weights, config.rank, norms), config.form)
    return halves(gaussian(weights, config.rank, seed, norms), config.form)


def _modules(task: Task, model: Any) -> list[str]:
    """Full names of the modules that lora, pissa and gaussian adapt."""
    config, wanted = task.config, wanted_modules(task.student, task.config.targets)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (found := _LAYER.match(name))
        and found["suffix"] in wanted
        and (config.layers is None or int(found["index"]) + 1 in config.layers)
    ]
    if config.embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names += [name for name, module in model.named_modules() if module in ends]
    return names


def _weight(model: Any, name: str) -> torch.Tensor:
    """A module's weight as (out, in) in float32 on the CPU; an embedding's is transposed."""
    module = model.get_submodule(name)
    weight: torch.Tensor = module.weight.detach().float().cpu()
    return weight.T if isinstance(module, nn.Embedding) else weight


def _require_same(start: Mapping[str, LowRank], model: Any, student: str) -> None:
    shapes = {}
    for name, module in model.named_modules():
        if name in start:
            shape = tuple(module.weight.shape)
            shapes[name] = shape[::-1] if isinstance(module, nn.Embedding) else shape
    for name, half in start.items():
        wanted = (half.b.shape[0], half.a.shape[1])
        if shapes.get(name) != wanted:
            raise IncompatibleError(
                f"--init: {name}: expected shape {shapes.get(name, 'none')} of {student}, "
                f"found {wanted}",
                "extract for this student",
            )
