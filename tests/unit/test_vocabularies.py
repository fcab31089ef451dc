"""Spellings of real tokenizer kinds, trained here, brought to the text they stand for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pkt.errors import IncompatibleError
from pkt.vocabularies import Spelling, common_ends, shared_tokens, spelling

TEXTS = [
    "the cat sat on the mat, and the dog was happy.",
    'She said: "naïve café" twice; they didn\'t mind!\n',
    "one two three 1234 and so on, again and again",
] * 3
SPECIALS = ["<s>", "</s>", "[UNK]"]


def byte_level(size: int = 320) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def sentence_piece(size: int = 200) -> Tokenizer:
    """BPE as Llama's: ▁ for a space, bytes for what has no token."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    made.train_from_iterator([text.replace("ï", "").replace("é", "") for text in TEXTS], trainer)
    whole = json.loads(made.to_str())
    for token in fallback:
        whole["model"]["vocab"][token] = len(whole["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(whole))


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="[UNK]", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIALS, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


KINDS = {
    "byte-level": byte_level(),
    "sentencepiece": sentence_piece(),
    "unigram": unigram(),
    "wordpiece": word_piece(),
}


def spelled(tokenizer: Tokenizer) -> Spelling:
    return spelling(json.loads(tokenizer.to_str()))


def test_three_spellings_of_a_word_with_a_space_are_one() -> None:
    for name, token in (
        ("byte-level", "Ġthe"), ("sentencepiece", "▁the"), ("unigram", "▁the"),
        ("wordpiece", "the"),
    ):  # fmt: skip
        number = KINDS[name].token_to_id(token)
        assert number is not None, name
        assert spelled(KINDS[name]).texts[number] == b" the", name


def test_what_does_not_begin_a_word_has_no_space() -> None:
    tokenizer = KINDS["wordpiece"]
    inner = [token for token in tokenizer.get_vocab() if token.startswith("##")]
    assert inner
    texts = spelled(tokenizer).texts
    for token in inner:
        assert texts[tokenizer.token_to_id(token)] == token[2:].encode()


def test_a_byte_is_the_same_in_both_ways_to_write_it() -> None:
    level, piece = KINDS["byte-level"], KINDS["sentencepiece"]
    newline = {name: spelled(KINDS[name]).texts for name in ("byte-level", "sentencepiece")}
    assert newline["byte-level"][level.token_to_id("Ċ")] == b"\n"
    assert newline["sentencepiece"][piece.token_to_id("<0x0A>")] == b"\n"
    assert piece.token_to_id("<0x0A>") in spelled(piece).spare


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "unigram"])
def test_the_texts_of_its_tokens_make_up_the_text(name: str) -> None:
    texts = spelled(KINDS[name]).texts
    for text in TEXTS[:3]:
        if name == "unigram":
            text = text.replace("\n", "")  # its pre-tokenizer knows no newline that was not seen
        made = b"".join(texts[number] for number in KINDS[name].encode(text).ids)
        assert made.decode().removeprefix(" ") == text, name


@pytest.mark.parametrize("name", KINDS)
def test_a_vocabulary_agrees_with_itself_token_by_token(name: str) -> None:
    each = spelled(KINDS[name])
    found = shared_tokens(each, each, 10**6, 10**6)
    size = KINDS[name].get_vocab_size()
    assert found.pairs == tuple((n, n) for n in range(size))
    assert (found.same, found.coverage) == (True, 1.0)


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_pairs_stand_for_the_same_text_and_meet_once(one: str, other: str) -> None:
    theirs, ours = spelled(KINDS[one]), spelled(KINDS[other])
    found = shared_tokens(theirs, ours, 10**6, 10**6, allow_low_coverage=True)
    assert found.pairs
    assert all(theirs.texts[a] == ours.texts[b] for a, b in found.pairs)
    for side in (0, 1):
        ids = [pair[side] for pair in found.pairs]
        assert len(ids) == len(set(ids))
    turned = shared_tokens(ours, theirs, 10**6, 10**6, allow_low_coverage=True)
    assert sorted((b, a) for a, b in turned.pairs) == sorted(found.pairs)
    names = {KINDS[one].id_to_token(a) for a, _ in found.pairs}
    assert set(SPECIALS) <= names, "special tokens agree by name"


def test_ids_without_a_row_are_no_tokens() -> None:
    each = spelled(KINDS["byte-level"])
    found = shared_tokens(each, each, 300, 310)
    assert found.pairs == tuple((n, n) for n in range(300))
    assert (found.teacher_tokens, found.student_tokens) == (300, 310)


def letters(text: str) -> Spelling:
    return Spelling({n: c.encode() for n, c in enumerate(text)}, frozenset(), frozenset())


def test_less_than_half_is_refused_unless_allowed() -> None:
    with pytest.raises(IncompatibleError, match=r"found 1 shared tokens .* \(33\.3%\)") as error:
        shared_tokens(letters("abc"), letters("cdefg"), 9, 9)
    assert error.value.exit_code == 3
    assert "--allow-low-coverage" in str(error.value.hint)
    found = shared_tokens(letters("abc"), letters("cdefg"), 9, 9, allow_low_coverage=True)
    assert found.pairs == ((2, 0),)
    assert shared_tokens(letters("abcd"), letters("cdefg"), 9, 9).coverage == 0.5


def test_nothing_shared_is_refused_even_so() -> None:
    with pytest.raises(IncompatibleError, match="found 0 shared tokens"):
        shared_tokens(letters("ab"), letters("cd"), 9, 9, allow_low_coverage=True)


def test_a_tokenizer_without_a_list_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="without a list of tokens"):
        spelling({"model": {"type": "WordLevel", "vocab": {}}})


@pytest.mark.parametrize("one", ["byte-level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("other", ["byte-level", "sentencepiece", "unigram"])
def test_both_have_read_the_same_text_where_they_end_together(one: str, other: str) -> None:
    for text in ("the cat sat on the mat, and again", "so the dog was happy. one two"):
        a, b = KINDS[one].encode(text).ids, KINDS[other].encode(text).ids
        theirs, ours = spelled(KINDS[one]), spelled(KINDS[other])
        found = common_ends(a, b, theirs, ours)
        assert found[-1] == (len(a) - 1, len(b) - 1)
        for x, y in found:
            read = [
                b"".join(each.texts[n] for n in ids[: end + 1]).removeprefix(b" ")
                for each, ids, end in ((theirs, a, x), (ours, b, y))
            ]
            assert read[0] == read[1]
        words = text.count(" ") + 1
        assert len(found) >= words, "at least where words end"


@pytest.mark.parametrize("other", ["byte-level", "sentencepiece", "unigram"])
def test_wordpiece_meets_the_others_at_every_word(other: str) -> None:
    """It does not say where spaces are: "mat ," and "mat," are one text."""
    text = "the cat sat on the mat, and again"
    a, b = KINDS["wordpiece"].encode(text).ids, KINDS[other].encode(text).ids
    found = common_ends(a, b, spelled(KINDS["wordpiece"]), spelled(KINDS[other]))
    assert found[-1] == (len(a) - 1, len(b) - 1)
    assert len(found) >= 8, "at least where words end"


def test_equal_tokenizations_meet_everywhere_but_at_special_tokens() -> None:
    each = spelled(KINDS["byte-level"])
    ids = [0, *KINDS["byte-level"].encode("the cat sat").ids, 1]
    assert common_ends(ids, ids, each, each) == [(n, n) for n in range(1, len(ids) - 1)]


def test_texts_that_part_meet_no_more() -> None:
    each: Any = letters("abc")
    assert common_ends([0, 1, 2, 0], [0, 1, 1, 0], each, each) == [(0, 0), (1, 1)]
    assert common_ends([0, 1], [0, 1, 2], each, each) == [(0, 0), (1, 1)]
