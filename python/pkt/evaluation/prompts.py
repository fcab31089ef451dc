"""The prompt of an instruction without an answer, in the templates that training uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkt.errors import UsageError
from pkt.records import Template


def instruction_prompt(row: Mapping[str, Any], tokenizer: Any, template: Template) -> str:
    """Instruction and input as `pkt.samples` renders a user's turn, up to where the answer begins.

    Raises:
        UsageError: ``chat``, and the tokenizer has no chat template.

    """
    content = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" or (template == "auto" and has_template):
        if not has_template:
            raise UsageError("template 'chat': the tokenizer has no chat template")
        turns = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return f"{content}\n" if template == "none" else f"<|user|>\n{content}\n\n<|assistant|>\n"
