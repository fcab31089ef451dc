"""Sample texts: JSONL → token ids, and which of them the loss counts.

Seeds, training examples and texts to evaluate on are read alike. A gradient is only as good as the
loss it is of, so what a sample is turns on a few rules that are written here and nowhere else:
which columns mean a prompt and an answer, how the two become one text, where the answer's tokens
begin, and what a cut leaves of them.

Notable choices: lines end at LF alone (U+2028 is text); special tokens are what the
tokenizer itself adds, never guessed; a sample without a token in the loss is an error, because
its gradient is zero and its run would "succeed"; of training examples a few may be left out so.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from pkt.errors import DataError, UsageError
from pkt.records import Sample, SampleSet, Template

_FORMS = (
    '{"messages"}, {"prompt", "completion"}, {"question", "answer"}, '
    '{"instruction", "input", "output"} or {"text"}'
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


class _MaskedError(DataError):
    """A row that a cut leaves without a token in the loss."""


def read_samples(
    path: Path,
    tokenizer: Any,
    *,
    template: Template = "auto",
    limit: int = 32,
    max_tokens: int = 2048,
    positions: int | None = None,
    vocabulary: int | None = None,
    spare: float = 0.0,
) -> SampleSet:
    r"""The samples of a JSONL file, as a model reads them.

    A row is one of (further columns are ignored, the first form that fits is taken)::

        {"messages": [{"role", "content"}, …]}         its last turn is the assistant's
        {"prompt", "completion"}                       strings, or lists of messages
        {"question", "answer"}
        {"instruction", "input", "output"}             input may be absent, null or empty
        {"text"}

    ``text`` is encoded as the tokenizer does by default, nothing appended; the loss counts every
    token but the first. All else is a conversation, and the loss counts its last turn and that
    turn's end token. It is rendered by ``template``:

    - ``chat``: the tokenizer's chat template, which writes every special token itself. The answer
      is the last span that the template marks with ``{% generation %}``, exactly as marked.
    - ``paper``: ``<|role|>\n…\n\n`` for each earlier turn, ``<|assistant|>\n…`` for the last.
    - ``none``: the turns' contents, joined by newlines.
    - ``auto``: ``chat`` if the tokenizer has a chat template, else ``paper``.

    ``paper`` and ``none`` are encoded as the tokenizer does by default (so they begin with its BOS
    if it adds one) and end with its EOS token, which the last turn alone carries. Where no span
    is marked, the answer is what follows the separately encoded prompt: all tokens after the
    longest common prefix of both. So a token that straddles the border counts, since it holds a
    part of the answer, and whatever the chat template writes after the answer counts too.

    Args:
        path: UTF-8 file, one JSON object a line; blank lines, CRLF and a BOM are accepted.
        tokenizer: a transformers tokenizer.
        template: how prompt and answer become one text.
        limit: the first so many rows are read, 0 means all; later rows are not parsed.
        max_tokens: longer samples are cut to their first tokens.
        positions: most tokens that the model takes; cuts like ``max_tokens``.
        vocabulary: rows of the model's embedding; ``None``: not looked at.
        spare: share of the rows that a cut may leave without an answer: they are left out.

    Raises:
        UsageError: ``limit`` below 0, ``max_tokens`` below 2, or ``chat`` without a template.
        DataError: an unreadable or empty file, a row that is none of the above, an empty answer,
            no EOS token to end an answer with, a conversation that the chat template refuses,
            a token that the embedding has no row for, or more than ``spare`` of the rows without a
            token in the loss. Rows are named ``file:line``.

    Source: arXiv 2310.11451, with the prompt format of maszhongming/ParaKnowTransfer@1a104a2.

    """
    if limit < 0:
        raise UsageError(f"limit: expected 0 (all rows) or more, found {limit}")
    if max_tokens < 2:
        raise UsageError(f"max-tokens: expected 2 or more, found {max_tokens}")
    template = _resolve(template, tokenizer)
    room = min(max_tokens, positions or max_tokens)
    samples, masked = [], []
    first: _MaskedError | None = None
    with closing(_rows(path)) as rows:  # the file, also where a row is refused
        for line, row in islice(rows, limit or None):
            where, name = f"{path}:{line}", f"{path.name}:{line}"
            try:
                samples.append(_sample(row, where, name, tokenizer, template, room))
            except _MaskedError as error:
                if not spare:
                    raise
                first = first or error
                masked.append(name)
                continue
            if vocabulary is not None and (largest := max(samples[-1].tokens)) >= vocabulary:
                raise DataError(
                    f"{where}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}): "
                    f"the model's embedding has {vocabulary} rows",
                    "its tokenizer was given tokens and the model was not resized: take the "
                    "tokenizer that the model was trained with, or resize_token_embeddings()",
                )
    total = len(samples) + len(masked)
    if not total:
        raise DataError(f"{path}: expected one JSON object a line, found no row")
    if first and len(masked) > spare * total:
        raise DataError(
            f"{path}: {len(masked)} of {total} rows have no token left in the loss; "
            f"the first: {first.message}",
            first.hint,
        )
    return SampleSet(tuple(samples), _digest(samples), template, tuple(masked))


def sample_set(samples: Sequence[Sample], template: str) -> SampleSet:
    """Some samples of a set as a set of their own."""
    return SampleSet(tuple(samples), _digest(samples), template)


def show_sample(sample: Sample, tokenizer: Any) -> str:
    """One sample as text, its loss tokens between ⟦ and ⟧, below a line of counts.

    A character of which only a part is in the loss counts as in it. Characters
    that do not print are written as escapes, so that a sample cannot command the terminal.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    text = decode(sample.tokens)
    edges = [0]  # characters where the text enters and leaves the loss, alternating
    inside = False
    for index, counts in enumerate(sample.loss_mask):
        if counts != inside:
            edges.append(_common_prefix(decode(sample.tokens[:index]), text))
            inside = counts
    pieces = [_printable(text[a:b]) for a, b in zip(edges, [*edges[1:], len(text)], strict=True)]
    marked = "".join(f"⟦{piece}⟧" if i % 2 else piece for i, piece in enumerate(pieces))
    cut = ", cut" if sample.cut else ""
    counts_line = f"{len(sample.tokens)} tokens{cut}, {sample.loss_tokens} of them in the loss ⟦…⟧"
    return f"{sample.name}: {counts_line}\n{marked}"


def _resolve(template: Template, tokenizer: Any) -> Template:
    """What ``auto`` comes to."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_template:
        raise UsageError(
            "template 'chat': the tokenizer has no chat template",
            "use --template paper or none, or auto, which takes the chat template if there is one",
        )
    if template == "auto":
        return "chat" if has_template else "paper"
    return template


def _rows(path: Path) -> Generator[tuple[int, Any], None, None]:
    """Line number, from 1, and parsed JSON of each line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _parse(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        packed = line.startswith(b"\x1f\x8b")
        raise DataError(
            f"{where}: not UTF-8 at byte {error.start + 1} of the line",
            "unpack it first, with gunzip" if packed else "convert it, for example with iconv",
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.colno}: {error.msg}",
            "one JSON object a line (JSONL), not a pretty-printed document",
        ) from error
    except (ValueError, RecursionError) as error:  # integers and nesting beyond Python's limits
        raise DataError(f"{where}: JSON that Python does not read: {error}") from error


def _sample(
    row: Any, where: str, name: str, tokenizer: Any, template: Template, room: int
) -> Sample:
    content = _content(row, where)
    if isinstance(content, str):
        tokens = _encode(tokenizer, content)
        answer = range(1, len(tokens))
    elif template == "chat":
        tokens, answer = _encode_chat(content, tokenizer, where)
    else:
        tokens, answer = _encode_plain(content, tokenizer, template, where)
    mask = tuple(index in answer for index in range(len(tokens)))
    if len(tokens) > room and any(mask) and not any(mask[:room]):
        raise _MaskedError(
            f"{where}: cut to {room} of its {len(tokens)} tokens, it ends before its answer, "
            f"which begins at token {answer.start}",
            "raise --max-tokens as far as the model's positions allow, or drop the row",
        )
    if not any(mask):
        raise DataError(f"{where}: no token to predict in its {len(tokens)} tokens")
    return Sample(name, tuple(tokens[:room]), mask[:room], cut=len(tokens) > room)


def _content(row: Any, where: str) -> str | list[Message]:
    """Either the row's plain text, or its conversation, whose last turn is the assistant's."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected a JSON object, found {_kind(row)}",
            f"one object a line: {_FORMS}",
        )
    if "messages" in row:
        turns = _turns(row, "messages", "", where)
    elif row.keys() >= {"prompt", "completion"}:
        prompt = _turns(row, "prompt", "user", where)
        turns = [*prompt, *_turns(row, "completion", "assistant", where)]
    elif row.keys() >= {"question", "answer"}:
        question = _turns(row, "question", "user", where)
        turns = [*question, *_turns(row, "answer", "assistant", where)]
    elif row.keys() >= {"instruction", "output"}:
        given = {**row, "input": ""} if row.get("input") is None else row
        parts = [_string(given, column, where) for column in ("instruction", "input")]
        task = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
        turns = [task, *_turns(row, "output", "assistant", where)]
    elif "text" in row:
        text = _string(row, "text", where)
        if not text.strip():
            raise DataError(f"{where}: 'text' is empty")
        return text
    else:
        found = ", ".join(f'"{key}"' for key in row) or "none"
        raise DataError(f"{where}: unknown columns: found {found}", f"expected {_FORMS}")
    roles = [turn["role"] for turn in turns]
    if roles[-1:] != ["assistant"] or len(roles) < 2:
        raise DataError(
            f"{where}: no answer to take the loss of: expected a prompt, then a last turn of "
            f"role 'assistant', found {', '.join(roles) or 'no turn'}"
        )
    if not turns[-1]["content"].strip():
        raise DataError(f"{where}: its answer is empty")
    return turns


def _turns(row: Mapping[str, Any], column: str, role: str, where: str) -> list[Message]:
    """A column as messages: a list of them, or a string that ``role`` says (``""``: not here)."""
    value = row[column]
    if role and not isinstance(value, list):
        return [{"role": role, "content": _string(row, column, where)}]
    if not isinstance(value, list):
        raise DataError(f"{where}: '{column}': expected a list of messages, found {_kind(value)}")
    for index, message in enumerate(value):
        at = f"{where}: {column}[{index}]"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise DataError(f'{at}: expected {{"role", "content"}}, found {_kind(message)}')
        _string(message, "role", at)
        _string(message, "content", at)
    return value


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{column}': expected a string, found {_kind(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: '{column}': half of a surrogate pair, which is no character")
    return value


def _kind(value: Any) -> str:
    """A JSON value's type, for messages."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(f'"{key}"' for key in value) or "no key")
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}
    return names.get(type(value), "a number")


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])  # quiet about the length: we cut


def _encode_plain(
    turns: Sequence[Message], tokenizer: Any, template: Template, where: str
) -> tuple[list[int], range]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{where}: the tokenizer has no EOS token to end the answer with",
            'name one in its tokenizer_config.json ("eos_token"), or give {"text"} rows',
        )
    *before, last = turns
    if template == "paper":
        prompt = "".join(f"<|{turn['role']}|>\n{turn['content']}\n\n" for turn in before)
        prompt += "<|assistant|>\n"
    else:
        prompt = "".join(f"{turn['content']}\n" for turn in before)
    tokens = _encode(tokenizer, prompt + last["content"])
    if tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    return tokens, _after(_encode(tokenizer, prompt), tokens)


def _encode_chat(turns: Sequence[Message], tokenizer: Any, where: str) -> tuple[list[int], range]:
    def render(messages: Sequence[Message], **options: bool) -> Mapping[str, list[int]]:
        try:
            rendered: Mapping[str, list[int]] = tokenizer.apply_chat_template(
                list(messages), return_dict=True, tokenizer_kwargs={"verbose": False}, **options
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{where}: the chat template refuses it: {reason}") from error
        return rendered

    marks = tokenizer.is_fast and bool(_GENERATION.search(tokenizer.get_chat_template()))
    whole = render(turns, return_assistant_tokens_mask=marks)
    tokens = list(whole["input_ids"])
    marked = bytes(whole.get("assistant_masks", ()))
    if 1 in marked:
        stop = marked.rindex(1) + 1
        return tokens, range(max(1, marked.rfind(0, 0, stop) + 1), stop)
    prompt = render(turns[:-1], add_generation_prompt=True)
    return tokens, _after(prompt["input_ids"], tokens)


def _after(prompt: Sequence[int], tokens: Sequence[int]) -> range:
    """Where the answer lies: all that follows the prompt, but never the very first token."""
    return range(max(1, _common_prefix(prompt, tokens)), len(tokens))


def _common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


def _printable(text: str) -> str:
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over, sample by sample, the length (u64), the token ids (u32) and the mask (bytes).

    All little-endian, so that the hash is the same on every host.
    """
    digest = hashlib.sha256()
    for sample in samples:
        length = len(sample.tokens)
        digest.update(
            struct.pack(f"<Q{length}I{length}?", length, *sample.tokens, *sample.loss_mask)
        )
    return digest.hexdigest()
