"""The adapter folder's model card: what lies in it, and how it is used.

A start from `pkt extract` looks like any other LoRA, and loading it like any other is the
mistake that its card has to prevent; a tuned adapter is loaded just so.
"""

from __future__ import annotations

import json
import os
import shlex
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

`pkt train --student {student_word} --init THIS_FOLDER --data train.jsonl -o tuned` does all of it.
By hand, with peft alone:

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

_TUNED = """\
---
{front_matter}---

# A LoRA, fine-tuned from {origin}

A plain LoRA on the untouched student, {student}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

student = AutoModelForCausalLM.from_pretrained({student_literal})
model = PeftModel.from_pretrained(student, ".")  # this folder
```

{rank}

| | |
|---|---|
| student | {student_model} |
| training data | {data} |
| steps | {steps} of {batch} examples |
| training loss, last step | {loss} |
{held_out}| start | {start} |
{options}

Written by pkt {pkt}. `pkt_manifest.json` holds the hashes of all inputs, `metrics.jsonl` the loss
of each step.
"""


def model_card(manifest: Mapping[str, Any], base_model: str) -> str:
    """The text of the adapter folder's ``README.md``: YAML front matter, then Markdown.

    The front matter names ``base_model`` only if it is a hub id, for the hub refuses all else;
    of a folder the text names the last part alone, so that no path of this host is told.

    Args:
        manifest: the extraction's ``pkt_manifest.json``.
        base_model: hub id or folder of the student.

    """
    front, name, student = _base(manifest["method"], base_model)
    seeds, options = manifest["seeds"], manifest["options"]
    return _CARD.format(
        front_matter=yaml.safe_dump(front, allow_unicode=True),
        student=student,
        student_literal=json.dumps(name, ensure_ascii=False),
        student_word=shlex.quote(name),
        method=_cell(manifest["method"]),
        select=_cell(options["select"]),
        teacher_model=_describe(manifest["teacher"]),
        student_model=_describe(manifest["student"]),
        seeds=f"{seeds['count']} texts, {seeds['loss_tokens']} of {seeds['tokens']} tokens "
        f"in the loss, `{seeds['sha256'][:12]}`",
        layers=", ".join(map(str, manifest["layers"])),
        options=_rows(options),
        pkt=manifest["pkt"],
    )


def tuned_card(manifest: Mapping[str, Any], base_model: str) -> str:
    """The text of ``README.md`` beside a tuned adapter; arguments as of `model_card`."""
    front, name, student = _base(manifest["method"], base_model)
    start, data, options = manifest["start"], manifest["data"], manifest["options"]
    rank, losses = manifest["rank"], manifest["eval_loss"]
    extracted = start["init"] == "extracted"
    origin = "what was extracted from a larger model" if extracted else f"a {start['init']} start"
    served = (
        f"Its rank is {rank}: the trained half and, beside it, the start that is subtracted. vLLM "
        f"serves ranks up to 16 unless started with `--max-lora-rank {rank}`; `pkt export --rank` "
        "makes it smaller and says at what error."
        if rank > 16
        else f"Its rank is {rank}."
    )
    form = start["form"] if start["form"] != "scaled" else f"scaled by {start['scale']:g}"
    held_out = (
        f"| held-out loss, student → tuned | {losses['student']:.4f} → {losses['tuned']:.4f} "
        "nats a token |\n"
        if losses
        else ""
    )
    return _TUNED.format(
        front_matter=yaml.safe_dump(front, allow_unicode=True),
        origin=origin,
        student=student,
        student_literal=json.dumps(name, ensure_ascii=False),
        rank=served,
        student_model=_describe(manifest["student"]),
        data=f"{data['count']} examples, {data['loss_tokens']} of {data['tokens']} tokens in the "
        f"loss, `{data['sha256'][:12]}`",
        steps=manifest["steps"],
        batch=options["batch_size"],
        loss=f"{manifest['loss']:.4f} {loss_unit(options)}",
        held_out=held_out,
        start=_cell(start["init"] + ("" if start["init"] == "lora" else f", {form}")),
        options=_rows(options),
        pkt=manifest["pkt"],
    )


def _base(method: str, base_model: str) -> tuple[dict[str, Any], str, str]:
    """Front matter, the student's name, and what the text calls it."""
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "pkt", method]}
    if _is_hub_id(base_model):
        front["base_model"] = base_model
        return front, base_model, f"[{base_model}](https://huggingface.co/{base_model})"
    name = os.path.basename(os.path.abspath(base_model)) or "student"
    return front, name, f"the model in the folder `{_cell(name)}`"


def loss_unit(options: Mapping[str, Any]) -> str:
    """What a training loss is counted in: nats, but where it is made of activations too."""
    objective = options.get("objective")
    return f"({objective})" if objective else "nats a token"


def _rows(options: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {_cell(name.replace('_', '-'))} | {_cell(value)} |"
        for name, value in sorted(options.items())
        if value is not None
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
