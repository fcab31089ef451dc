"""What `pkt demo` shows beside the tables: a text of each model, and one page of everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pkt.models import load_tokenizer, open_model


def continuations(
    prompt: str,
    student: str,
    teacher: str,
    adapters: Mapping[str, Path],
    *,
    max_new_tokens: int,
) -> dict[str, str]:
    """What student, each adapter on it, and teacher write after ``prompt``, greedily.

    Args:
        prompt: text to begin with.
        student: folder, hub id.
        teacher: the same.
        adapters: PEFT folders of the student, by the name of their entry.
        max_new_tokens: of each.

    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    small, large = (open_model(name, {}) for name in (student, teacher))
    tokenizer = load_tokenizer(small)

    @torch.no_grad()
    def write(model: object) -> str:
        given = tokenizer(prompt, return_tensors="pt")
        made = model.generate(  # type: ignore[attr-defined]
            **given, max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return str(tokenizer.decode(made[0], skip_special_tokens=True))

    base = AutoModelForCausalLM.from_pretrained(small.folder, trust_remote_code=False)
    found = {"student": write(base)}
    for name, folder in adapters.items():
        tuned = PeftModel.from_pretrained(base, str(folder))
        found[name] = write(tuned)
        base = tuned.unload()
    model = AutoModelForCausalLM.from_pretrained(large.folder, trust_remote_code=False)
    return {**found, "teacher": write(model)}


def write_overview(folder: Path, table: str, stories: Mapping[str, str]) -> Path:
    """``folder/index.html``: the table, the stories, and every picture of the reports below."""
    from pkt.report import write_overview as write

    return write(folder, table, stories)
