"""Two vocabularies side by side: which tokens are the same text, and where two tokenizations meet.

Tokenizers spell one text in three ways: byte-level ones write a printable stand-in for each byte
("Ġthe"), sentencepiece ones "▁" for a space and "<0x0A>" for a byte without a token of its own,
WordPiece marks what does not begin a word ("##ing"). All are brought to the bytes they stand for,
a space in front where the spelling has one, or in WordPiece begins a word.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkt.errors import IncompatibleError
from pkt.records import SharedTokens

LEAST_COVERAGE = 0.5
SPACE = "▁"  # sentencepiece's
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Spelling:
    """What each token of one vocabulary stands for, by id."""

    texts: Mapping[int, bytes]  #: of every token; a special token's is its name
    special: frozenset[int]  #: tokens that stand for no text
    spare: frozenset[int]  #: single bytes, for text that has no token of its own
    words: bool = False  #: a space before each word is taken for granted (WordPiece)


def spelling(description: Mapping[str, Any]) -> Spelling:
    """What the tokens of a ``tokenizer.json`` stand for.

    Args:
        description: that file's object, or what ``backend_tokenizer.to_str()`` says.

    Raises:
        IncompatibleError: it has no vocabulary.

    """
    model = description.get("model") or {}
    listed = model.get("vocab")
    if isinstance(listed, list):  # unigram: pairs of piece and score
        listed = {piece[0]: index for index, piece in enumerate(listed)}
    if not isinstance(listed, dict) or not listed:
        raise IncompatibleError("a tokenizer without a list of tokens cannot be aligned")
    texts = _reader(description, listed)
    added = {token["id"]: token for token in description.get("added_tokens") or ()}
    special = {number for number, token in added.items() if token.get("special")}
    found = {n: texts(token) for token, n in listed.items() if n not in special}
    found |= {n: token["content"].encode() for n, token in added.items()}
    spare = {n for token, n in listed.items() if n not in added and _BYTE.fullmatch(token)}
    words = model.get("type") == "WordPiece"
    return Spelling(found, frozenset(special), frozenset(spare), words)


def shared_tokens(
    teacher: Spelling,
    student: Spelling,
    teacher_rows: int,
    student_rows: int,
    *,
    allow_low_coverage: bool = False,
) -> SharedTokens:
    """The tokens that stand for the same text in both vocabularies.

    Special tokens agree by name. Where several tokens of one vocabulary stand for one text, tokens
    that are text come first, then spare bytes, each by id, and the first goes with the other
    vocabulary's first: of equal vocabularies every token goes with itself.

    Args:
        teacher: its tokens.
        student: its tokens.
        teacher_rows: of its head; ids from there on have no row.
        student_rows: of its head.
        allow_low_coverage: accept less than half of the smaller vocabulary.

    Raises:
        IncompatibleError: less than half of the smaller vocabulary is shared, or nothing is.

    """
    theirs = _by_text(teacher, teacher_rows)
    ours = _by_text(student, student_rows)
    pairs = [
        pair
        for key in theirs.keys() & ours.keys()
        for pair in zip(theirs[key], ours[key])  # noqa: B905
    ]
    same = teacher.texts == student.texts and teacher.special == student.special
    counts = sum(map(len, theirs.values())), sum(map(len, ours.values()))
    found = SharedTokens(tuple(sorted(pairs)), counts[0], counts[1], same)
    if not pairs or (found.coverage < LEAST_COVERAGE and not allow_low_coverage):
        raise IncompatibleError(
            f"vocabularies: expected at least half of the smaller one in the other, found "
            f"{len(pairs)} shared tokens of the teacher's {counts[0]} and the student's "
            f"{counts[1]} ({found.coverage:.1%})",
            "--allow-low-coverage goes on with what is shared" if pairs else None,
        )
    return found


def common_ends(
    teacher: Sequence[int], student: Sequence[int], theirs: Spelling, ours: Spelling
) -> list[tuple[int, int]]:
    """Positions at which both tokenizations of one text end a stretch of it together.

    A space that only one of them puts in front of the text does not count (no space does where one
    takes them for granted), nor do special tokens: of several positions that end at one place the
    first that holds text stands. Where the two do not spell the same text, nothing is found from
    the first difference on.

    Args:
        teacher: token ids of the text.
        student: token ids of the same text.
        theirs: what the teacher's tokens stand for.
        ours: what the student's stand for.

    Returns:
        (teacher position, student position), ascending.

    """
    spaces = not (theirs.words or ours.words)
    whole, ends = _ends(teacher, theirs, spaces)
    other, others = _ends(student, ours, spaces)
    same = next(
        (i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b),
        min(len(whole), len(other)),
    )
    return [
        (place, others[end]) for end, place in sorted(ends.items()) if end <= same and end in others
    ]


def _ends(tokens: Sequence[int], spelled: Spelling, spaces: bool) -> tuple[bytes, dict[int, int]]:
    """The text, and the position of the token that ends at each byte of it."""
    text, ends = bytearray(), dict[int, int]()
    for position, token in enumerate(tokens):
        if token in spelled.special:
            continue
        piece = spelled.texts.get(token, b"")
        if not spaces:
            piece = piece.replace(b" ", b"")
        elif not text:
            piece = piece.removeprefix(b" ")
        text += piece
        if piece:
            ends.setdefault(len(text), position)
    return bytes(text), ends


def _by_text(spelled: Spelling, rows: int) -> dict[tuple[bool, bytes], list[int]]:
    """Ids by whether they are special and what they stand for, text before spare bytes."""
    found: dict[tuple[bool, bytes], list[int]] = defaultdict(list)
    for number in sorted(spelled.texts, key=lambda n: (n in spelled.spare, n)):
        if number < rows:
            found[number in spelled.special, spelled.texts[number]].append(number)
    return found


def _reader(description: Mapping[str, Any], listed: Mapping[str, int]) -> Callable[[str], bytes]:
    """How a token of this vocabulary is read."""
    model = description["model"]
    parts = {part.get("type") for part in _parts(description)}
    if "ByteLevel" in parts:
        return _byte_level()
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or "##"

        def piece(token: str) -> bytes:
            if token.startswith(prefix) and token != prefix:
                return token.removeprefix(prefix).encode()
            return f" {token}".encode()

        return piece
    byte_fallback = bool(model.get("byte_fallback")) or "ByteFallback" in parts

    def sentence(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()

    if any(SPACE in token for token in listed) or byte_fallback:
        return sentence
    return str.encode


def _parts(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Pre-tokenizer and decoder, those inside a sequence included."""
    found: list[Mapping[str, Any]] = []
    waiting = [description.get("pre_tokenizer"), description.get("decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found.append(part)
            for inner in ("pretokenizers", "decoders"):
                waiting += part.get(inner) or []
    return found


def _byte_level() -> Callable[[str], bytes]:
    """Bytes of a byte-level spelling: printable ones stand for themselves, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    stands = {chr(byte): byte for byte in plain}
    stands |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def read(token: str) -> bytes:
        if all(character in stands for character in token):
            return bytes(stands[character] for character in token)
        return token.encode()  # added by hand, not spelled byte by byte

    return read
