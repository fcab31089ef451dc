"""The adapter folder's model card: what lies in it, and the one way in which it is of use.

A start from `pkt extract` looks like any other LoRA, and loading it like any other is the
mistake that the card has to prevent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_CARD = """\
---
{front_matter}---

# A LoRA start, extracted from a larger model

**This is not a finished adapter.** It is the start of a training run: for each target module,
factors `B₀A₀` of what was taken out of a larger model, the teacher, by the rule `{select}`
(`window`: the sub-matrix that the teacher's loss is most sensitive to). The student is {student}.

## Do not load it on the untouched student

Loaded as it is, it computes `W_S + B₀A₀`: the teacher's sub-matrices are added to the student's
weights, which were never trained to go with them. That breaks the student's function. Subtract
the start from the student once, and training begins at exactly the student's function:

    W = (W_S − B₀A₀) + BA,    B = B₀ and A = A₀ at step 0

## Use

With peft alone:

```python
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

STUDENT = {student_literal}
START = "."  # this folder

model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
model = PeftModel.from_pretrained(model, START, is_trainable=True)
with torch.no_grad():
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().weight -= module.get_delta_weight("default")
# now the model computes what the student does: train it as any LoRA model
```

Subtract once, in float32. What is trained this way belongs to the student minus the start: for
the untouched student, save `[B | −B₀]` and `[A ; A₀]`, a LoRA of twice the rank. If the student
ties its embeddings to its head and either is a target, untie them first.

## How it was made

| | |
|---|---|
| method | {method} |
| teacher | {teacher_model} |
| student | {student_model} |
| seeds | {seeds} |
| teacher layers, in the student's order | {layers} |
{options}

Written by pkt {pkt}. `pkt_manifest.json` holds each window, its score, and the hashes of all
inputs.
"""


def model_card(manifest: Mapping[str, Any], base_model: str) -> str:
    """The text of the adapter folder's ``README.md``: YAML front matter, then Markdown.

    The front matter names ``base_model`` only if it is a hub id, for the hub refuses all else;
    of a folder the text names the last part alone, so that no path of this host is told.

    Args:
        manifest: the extraction's ``pkt_manifest.json``.
        base_model: hub id or folder of the student.

    """
    method = manifest["method"]
    front = {"library_name": "peft", "tags": ["lora", "pkt", method]}
    if _is_hub_id(base_model):
        front["base_model"] = name = base_model
        student = f"[{name}](https://huggingface.co/{name})"
    else:
        name = os.path.basename(os.path.abspath(base_model)) or "student"
        student = f"the model in the folder `{_cell(name)}`"
    seeds, options = manifest["seeds"], manifest["options"]
    rows = [
        f"| {_cell(name.replace('_', '-'))} | {_cell(value)} |"
        for name, value in sorted(options.items())
        if value is not None
    ]
    return _CARD.format(
        front_matter=yaml.safe_dump(front, allow_unicode=True),
        student=student,
        student_literal=json.dumps(name, ensure_ascii=False),
        method=_cell(method),
        select=_cell(options["select"]),
        teacher_model=_describe(manifest["teacher"]),
        student_model=_describe(manifest["student"]),
        seeds=f"{seeds['count']} texts, {seeds['loss_tokens']} of {seeds['tokens']} tokens "
        f"in the loss, `{seeds['sha256'][:12]}`",
        layers=", ".join(map(str, manifest["layers"])),
        options="\n".join(rows),
        pkt=manifest["pkt"],
    )


def _is_hub_id(name: str) -> bool:
    """Whether a name can be an id of the hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def _describe(model: Mapping[str, Any]) -> str:
    family, layers, digest = model["family"], model["layers"], model["config_sha256"]
    return f"{_cell(family)}, {layers} layers, configuration `{digest[:12]}`"


def _cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
