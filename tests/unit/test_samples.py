import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pkt.errors import DataError, UsageError
from pkt.records import Sample
from pkt.samples import read_samples, show_sample

MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def byte_level(*, bos=True, eos="</s>", chat=None, merges=()):
    """A byte-level BPE tokenizer: 256 bytes, two special tokens, and the merges asked for."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    wrapped.chat_template = chat
    return wrapped


def byte_fallback():
    """What Llama 2 has: words begin with ▁, unknown characters fall to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeno"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="seeds.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_bytes("\n".join(lines).encode())
        return path

    return write


def loss_text(seed, tokenizer):
    return tokenizer.decode([t for t, m in zip(seed.tokens, seed.loss_mask, strict=True) if m])


def text_of(seed, tokenizer):
    return tokenizer.decode(list(seed.tokens))


QUESTION = {"question": "2 + 2?", "answer": "It is 4."}
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
]


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_the_tokenizers_own_encoding_and_counts_all_but_its_first_token(write, bos):
    tokenizer = byte_level(bos=bos)
    seed = read_samples(write({"text": "Hi there"}), tokenizer).samples[0]
    assert list(seed.tokens) == tokenizer("Hi there")["input_ids"]
    assert seed.loss_mask == (False, *[True] * (len(seed.tokens) - 1))
    assert seed.name == "seeds.jsonl:1"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("template", "prompt"),
    [("auto", "<|user|>\n2 + 2?\n\n<|assistant|>\n"), ("none", "2 + 2?\n")],
)
def test_prompt_and_answer_become_bos_prompt_answer_eos(write, template, prompt, bos):
    tokenizer = byte_level(bos=bos)
    found = read_samples(write(QUESTION), tokenizer, template=template)
    seed = found.samples[0]
    assert found.template == ("paper" if template == "auto" else template)
    assert text_of(seed, tokenizer) == "<s>" * bos + prompt + "It is 4.</s>"
    assert loss_text(seed, tokenizer) == "It is 4.</s>"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "It is 4.", "id": 7},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "It is 4."},
        {
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "completion": [{"role": "assistant", "content": "It is 4."}],
        },
        {"instruction": "2 + 2?", "input": "", "output": "It is 4.", "text": "the whole"},
        {"instruction": "2 + 2?", "input": None, "output": "It is 4."},
        {"instruction": "2 + 2?", "output": "It is 4."},
        {"instruction": "", "input": "2 + 2?", "output": "It is 4."},
        {
            "messages": [
                {"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "It is 4."},
            ]
        },
    ],
)
@pytest.mark.parametrize("chat", [None, MARKED, UNMARKED])
def test_every_form_of_one_conversation_is_one_seed(write, row, chat):
    tokenizer = byte_level(chat=chat)
    expected = read_samples(write(QUESTION), tokenizer)
    assert read_samples(write(row), tokenizer).sha256 == expected.sha256


def test_alpaca_input_follows_the_instruction_after_an_empty_line(write):
    tokenizer = byte_level()
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    seed = read_samples(write(row), tokenizer, template="none").samples[0]
    assert text_of(seed, tokenizer) == "<s>Add.\n\n2, 2\n4</s>"


@pytest.mark.parametrize("chat", [MARKED, UNMARKED])
def test_chat_template_writes_all_and_only_the_last_turn_counts(write, chat):
    tokenizer = byte_level(chat=chat)
    found = read_samples(write({"messages": TALK}), tokenizer)
    assert found.template == "chat"
    assert (
        text_of(found.samples[0], tokenizer)
        == "<s>[user]one[assistant]1</s>[user]two[assistant]2</s>"
    )
    assert loss_text(found.samples[0], tokenizer) == "2</s>"
    assert found.samples[0].tokens.count(tokenizer.bos_token_id) == 1


def test_marked_span_is_taken_exactly_as_marked(write):
    thinking = MARKED.replace("{% generation %}", "<think>{% generation %}")
    tokenizer = byte_level(chat=thinking)
    seed = read_samples(write(QUESTION), tokenizer).samples[0]
    assert text_of(seed, tokenizer).endswith("[assistant]<think>It is 4.</s>")
    assert loss_text(seed, tokenizer) == "It is 4.</s>"


def test_what_only_the_generation_prompt_holds_is_no_answer(write):
    opened = UNMARKED.replace("[assistant]{% endif %}", "[assistant]<think>\n{% endif %}")
    tokenizer = byte_level(chat=opened)
    seed = read_samples(write(QUESTION), tokenizer).samples[0]
    assert loss_text(seed, tokenizer) == "It is 4.</s>"


def test_plain_conversation_ends_its_last_turn_alone_with_eos(write):
    tokenizer = byte_level()
    path = write({"messages": [{"role": "system", "content": "Count."}, *TALK]})
    paper, none = (read_samples(path, tokenizer, template=t).samples[0] for t in ("paper", "none"))
    assert text_of(paper, tokenizer) == (
        "<s><|system|>\nCount.\n\n<|user|>\none\n\n<|assistant|>\n1\n\n"
        "<|user|>\ntwo\n\n<|assistant|>\n2</s>"
    )
    assert text_of(none, tokenizer) == "<s>Count.\none\n1\ntwo\n2</s>"
    assert loss_text(paper, tokenizer) == loss_text(none, tokenizer) == "2</s>"


def test_token_across_the_border_counts(write):
    tokenizer = byte_level(merges=[("Ċ", "I")])
    seed = read_samples(write(QUESTION), tokenizer, template="none").samples[0]
    assert loss_text(seed, tokenizer) == "\nIt is 4.</s>"


def test_first_token_never_counts(write):
    tokenizer = byte_level(bos=False, merges=[("Ċ", "I")])
    row = {"question": "", "answer": "It"}
    seed = read_samples(write(row), tokenizer, template="none").samples[0]
    assert seed.loss_mask == (False, True, True)


def test_eos_of_the_tokenizer_is_not_doubled(write):
    tokenizer = byte_level()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    seed = read_samples(write(QUESTION), tokenizer, template="none").samples[0]
    assert text_of(seed, tokenizer) == "<s>2 + 2?\nIt is 4.</s>"
    assert loss_text(seed, tokenizer) == "It is 4.</s>"


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.text(st.characters(codec="utf-8"), max_size=12),
    answer=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip),
    template=st.sampled_from(["paper", "none", "chat"]),
)
def test_loss_ends_the_text_and_holds_the_whole_answer(write, prompt, answer, template):
    tokenizer = byte_level(chat=UNMARKED, merges=[("Ċ", "Ċ"), ("ĊĊ", "a"), ("]", "b")])
    path = write({"prompt": prompt, "completion": answer})
    seed = read_samples(path, tokenizer, template=template).samples[0]
    start = seed.loss_mask.index(True)
    assert all(seed.loss_mask[start:])
    assert loss_text(seed, tokenizer).endswith(answer + "</s>")
    shown = show_sample(seed, tokenizer).split("\n", 1)[1]
    assert shown.count("⟦") >= 1
    assert shown.endswith("</s>⟧")


def test_lines_end_at_newlines_alone(write, tmp_path):
    tokenizer = byte_level()
    rows = [json.dumps({"text": t}, ensure_ascii=False) for t in ("a\u2028b\x85c", "d")]
    plain = read_samples(write(*rows), tokenizer)
    assert text_of(plain.samples[0], tokenizer) == "<s>a\u2028b\x85c"
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n  \n".join([*rows, ""]).encode())
    dressed = read_samples(other, tokenizer)
    assert dressed.sha256 == plain.sha256
    assert [seed.name for seed in dressed.samples] == ["other.jsonl:1", "other.jsonl:4"]


def test_rows_beyond_the_limit_are_not_parsed(write):
    path = write({"text": "first"}, "", {"text": "second"}, "{broken")
    tokenizer = byte_level()
    assert len(read_samples(path, tokenizer, limit=2).samples) == 2
    with pytest.raises(DataError, match=r"seeds\.jsonl:4: not valid JSON at column 2"):
        read_samples(path, tokenizer, limit=0)
    many = write(*[{"text": "again"}] * 40)
    assert len(read_samples(many, tokenizer).samples) == 32
    assert len(read_samples(many, tokenizer, limit=0).samples) == 40


def test_a_cut_seed_is_a_prefix(write):
    tokenizer = byte_level()
    path = write(QUESTION, {"text": "a"})
    whole, short = read_samples(path, tokenizer, template="none").samples
    for limits in ({"max_tokens": 10}, {"positions": 10}, {"max_tokens": 99, "positions": 10}):
        cut, kept = read_samples(path, tokenizer, template="none", **limits).samples
        assert cut == Sample("seeds.jsonl:1", whole.tokens[:10], whole.loss_mask[:10], cut=True)
        assert kept == short
        assert not kept.cut
    size = len(whole.tokens)
    assert read_samples(path, tokenizer, template="none", max_tokens=size).samples[0] == whole


def test_cut_before_the_answer_is_an_error_that_says_so(write):
    path = write({"text": "fine"}, QUESTION)
    with pytest.raises(DataError, match=r"jsonl:2: cut to 8 of its 17 tokens, .* token 8") as error:
        read_samples(path, byte_level(), template="none", max_tokens=8)
    assert "--max-tokens" in error.value.hint
    assert read_samples(path, byte_level(), template="none", max_tokens=9).loss_tokens == 5


def test_digest_is_over_ids_and_masks_of_every_seed(write):
    tokenizer = byte_level()
    path = write({"text": "ab"}, QUESTION)
    found = read_samples(path, tokenizer)
    content = b"".join(
        len(seed.tokens).to_bytes(8, "little")
        + b"".join(token.to_bytes(4, "little") for token in seed.tokens)
        + bytes(seed.loss_mask)
        for seed in found.samples
    )
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.sha256 == read_samples(path, tokenizer).sha256
    others = {
        read_samples(path, tokenizer, template="none").sha256,
        read_samples(path, tokenizer, limit=1).sha256,
        read_samples(path, byte_level(bos=False)).sha256,
        read_samples(path, byte_level(chat=UNMARKED)).sha256,
        read_samples(write(QUESTION, {"text": "ab"}), tokenizer).sha256,
        found.sha256,
    }
    assert len(others) == 6


def messages(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", r"not valid JSON at column \d+"),
        ('{"text": 1' + "0" * 5000 + "}", "JSON that Python does not read"),
        ("[" * 100_000, "JSON that Python does not read"),
        ("[1]", "expected a JSON object, found a list"),
        ("null", "found null"),
        ({}, "unknown columns: found none"),
        ({"content": "x", "url": "y"}, 'unknown columns: found "content", "url"'),
        ({"prompt": "x"}, 'unknown columns: found "prompt"'),
        ({"text": 3}, "'text': expected a string, found a number"),
        ({"text": None}, "'text': expected a string, found null"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "\ud83d"}, "half of a surrogate pair"),
        ({"question": "x", "answer": True}, "'answer': expected a string, found a boolean"),
        ({"question": "x", "answer": ""}, "its answer is empty"),
        ({"instruction": [], "output": "x"}, "'instruction': expected a string, found a list"),
        ({"instruction": "x", "input": 0, "output": "x"}, "'input': expected a string"),
        ({"messages": "hello"}, "'messages': expected a list of messages, found a string"),
        ({"messages": ["hello"]}, r"messages\[0\]: expected .*, found a string"),
        ({"messages": [{"from": "gpt"}]}, r'messages\[0\]: .* found an object with "from"'),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: 'content'"),
        ({"messages": []}, "found no turn"),
        (messages("assistant"), "no answer .* found assistant"),
        (messages("user"), "no answer .* found user"),
        (messages("user", "assistant", "user"), "no answer .* found user, assistant, user"),
        ({"prompt": [], "completion": "x"}, "no answer"),
    ],
)
@pytest.mark.parametrize("chat", [None, MARKED])
def test_bad_rows_are_named(write, row, says, chat):
    path = write({"text": "fine"}, row)
    with pytest.raises(DataError, match=rf"seeds\.jsonl:2: (.*{says}|{says})") as error:
        read_samples(path, byte_level(chat=chat))
    assert error.value.exit_code == 5
    assert "\n" not in error.value.message


def test_text_of_one_token_predicts_nothing(write):
    with pytest.raises(DataError, match=r"jsonl:1: no token to predict in its 1 tokens"):
        read_samples(write({"text": "a"}), byte_level(bos=False))


def test_a_template_that_refuses_is_quoted(write):
    path = write(QUESTION, messages("system", "user", "assistant"))
    with pytest.raises(DataError, match=r"jsonl:2: the chat template refuses it: no system"):
        read_samples(path, byte_level(chat=STRICT + MARKED))


def test_no_eos_matters_only_where_an_answer_needs_it(write):
    tokenizer = byte_level(eos=None)
    assert read_samples(write({"text": "fine"}), tokenizer).samples
    with pytest.raises(DataError, match=r"jsonl:1: the tokenizer has no EOS token"):
        read_samples(write(QUESTION), tokenizer)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="found no row"):
        read_samples(path, byte_level())


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read: No such file"):
        read_samples(tmp_path / "missing.jsonl", byte_level())
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_samples(tmp_path, byte_level())
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
    with pytest.raises(DataError, match=r"jsonl:2: not UTF-8 at byte 11"):
        read_samples(path, byte_level())
    path.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="not UTF-8") as error:
        read_samples(path, byte_level())
    assert "gunzip" in error.value.hint


@pytest.mark.parametrize("options", [{"limit": -1}, {"max_tokens": 1}, {"template": "chat"}])
def test_contradictory_requests_are_usage_errors(write, options):
    with pytest.raises(UsageError):
        read_samples(write({"text": "fine"}), byte_level(), **options)


def test_sample_marks_the_loss(write):
    tokenizer = byte_level()
    seed = read_samples(write(QUESTION), tokenizer, template="none", max_tokens=12).samples[0]
    assert show_sample(seed, tokenizer) == (
        "seeds.jsonl:1: 12 tokens, cut, 4 of them in the loss ⟦…⟧\n<s>2 + 2?\n⟦It i⟧"
    )
    several = Sample("s:1", seed.tokens, tuple(i in {1, 2, 5} for i in range(12)))
    assert show_sample(several, tokenizer).endswith("\n<s>⟦2 ⟧+ ⟦2⟧?\nIt i")


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_sample_survives_characters_split_between_tokens(build):
    tokenizer = build()
    tokens = tuple(tokenizer("a é☃ b")["input_ids"])
    text = tokenizer.decode(tokens)
    for start in range(1, len(tokens)):
        seed = Sample("s:1", tokens, tuple(i >= start for i in range(len(tokens))))
        before, _, counted = show_sample(seed, tokenizer).split("\n", 1)[1].partition("⟦")
        assert before + counted.removesuffix("⟧") == text
        assert tokenizer.decode(tokens[start:]).strip("�") in counted


def test_sample_cannot_command_the_terminal(write):
    seed = read_samples(write({"text": "a\x1b[31m\u202eb\n\tc"}), byte_level()).samples[0]
    assert show_sample(seed, byte_level()).endswith("<s>⟦a\\x1b[31m\\u202eb\n\tc⟧")


def test_importing_loads_neither_torch_nor_transformers():
    check = "import sys, pkt.samples; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(sys.modules["pkt.samples"].__file__).parents[1]
    subprocess.run([sys.executable, "-c", check], check=True, env={"PYTHONPATH": str(root)})
