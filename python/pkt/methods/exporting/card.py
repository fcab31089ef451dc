"""What the README of an export says: how to load it, and of a residual base how to come back."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

VLLM_DEFAULT = 16
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_LORA = """\
---
{front}---

# A LoRA of rank {rank}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

student = AutoModelForCausalLM.from_pretrained({student})
model = PeftModel.from_pretrained(student, ".")  # this folder
```

It belongs to the untouched student; alpha equals the rank, all weights are float32.{served}

Written by pkt {pkt}.
"""

_MERGED = """\
---
{front}---

# {title}, with an adapter merged in

A complete model: `AutoModelForCausalLM.from_pretrained(".")`.{parted}

{rounding}

Written by pkt {pkt}.
"""

_RESIDUAL = """\
# A start, taken out of its student

| folder | content |
|---|---|
| `base` | the student with the start subtracted, W − B₀A₀, {dtype} |
| `adapter` | the start (A₀, B₀), a LoRA of rank {rank} on that base |

Together they compute exactly what the student does: training begins there.{precision}

## Train

With any loop that continues a PEFT adapter: TRL's `SFTTrainer(model=model, …)`, axolotl's
`base_model: base` and `lora_model_dir: adapter`, or your own:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
# … train …
model.save_pretrained("trained", save_embedding_layers=False)
```

`is_trainable=True` matters: without it nothing is trained, and no error says so. Train the LoRA
factors alone (no DoRA, biases or modules_to_save). Dropout of 0.05 is usual.

## Come back

What you trained belongs to `base`. For the untouched student:

```
pkt export --run trained --extracted {extracted} --student {student} --to lora -o served
```

writes `[B | −B₀]` and `[A ; A₀]`, a LoRA of twice the rank; `--rank N` makes it smaller and says at
what error; `--to merged` writes the whole student.

`adapter/adapter_config.json` names `base` by its full path: edit it if you move the folder and
load with `AutoPeftModelForCausalLM`.

Written by pkt {pkt}.
"""


def card(
    manifest: Mapping[str, Any], base_model: str, extracted: str = "", lost: float | None = None
) -> str:
    """The text of README.md.

    Args:
        manifest: of the export.
        base_model: the student, a hub id or a folder, whose last part alone is told.
        extracted: the folder of the start, its last part alone.
        lost: the largest relative rounding error of a merge; ``None`` if nothing was rounded.

    """
    name = _name(base_model)
    front: dict[str, Any] = {"tags": ["pkt", "lora"]}
    rank, dtype = manifest["rank"], _DTYPES.get(manifest["dtype"], manifest["dtype"])
    if manifest["to"] == "lora":
        front["library_name"] = "peft"
        served = f"\n\n{serving_note(rank)}" if rank > VLLM_DEFAULT else ""
        return _LORA.format(
            front=yaml.safe_dump(front), rank=rank, served=served, pkt=manifest["pkt"],
            student=json.dumps(name, ensure_ascii=False),
        )  # fmt: skip
    if manifest["to"] == "merged":
        front["library_name"] = "transformers"
        parted = " Head and embedding, once tied, are parted." if manifest["parted"] else ""
        rounding = (
            f"Weights are {dtype}. Rounding to it took at most {lost:.1%} of a module's change; "
            "`pkt_manifest.json` says it of each, and `pkt export --to merged --dtype float32` "
            "loses nothing."
            if lost is not None and dtype != "float32"
            else "Weights are float32: the change is kept whole."
        )
        return _MERGED.format(
            front=yaml.safe_dump(front), title=name, parted=parted, rounding=rounding,
            pkt=manifest["pkt"],
        )  # fmt: skip
    precision = (
        " The base is float32 whatever the student's type, for in bfloat16 rounding W − B₀A₀ puts "
        "every matrix off by about 3e-3; the result is exported onto the untouched student, so its "
        "type stays."
        if dtype == "float32"
        else f" In {dtype} that holds up to the rounding of W − B₀A₀; `--dtype float32` is exact."
    )
    return _RESIDUAL.format(
        dtype=dtype, rank=rank, precision=precision,
        extracted=shlex.quote(_name(extracted)), student=shlex.quote(name), pkt=manifest["pkt"],
    )  # fmt: skip


def serving_note(rank: int) -> str:
    """What a server must be told to take an adapter of this rank."""
    option = next((size for size in _VLLM_RANKS if size >= rank), None)
    if option is None:
        return f"No server takes rank {rank}: make it smaller with `pkt export --rank`, or merge."
    return (
        f"vLLM serves ranks up to {VLLM_DEFAULT} unless started with `--max-lora-rank {option}`; "
        f"`pkt export --rank {VLLM_DEFAULT}` makes it smaller and says at what error."
    )


def _name(model: str) -> str:
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
