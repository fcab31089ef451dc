"""Tiny tokenizers, trained offline in milliseconds, with or without BOS and chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(
    folder: Path,
    vocab_size: int = 128,
    bos: bool = True,
    chat_template: str | None = None,
) -> int:
    """Write a byte-level BPE tokenizer into `folder` and return its number of tokens.

    Ids 0 to 3 are SPECIALS; 4 and 5 are <|im_start|> and <|im_end|> (the EOS then) if there is a
    chat template: CHATML, CHATML_MARKED (with generation marks) or one of your own. From a
    vocab_size of 300 on every byte has a token; below, printable ASCII, tab and newline have, and
    the rest is <unk>. The result may have fewer than vocab_size tokens, never more, so a model of
    vocab_size rows may hold padding rows.

    Args:
        folder: created where it does not exist; model files already there stay.
        vocab_size: at least 110.
        bos: whether encoding puts <s> first.
        chat_template: Jinja text or None.

    """
    specials = [*SPECIALS, *(("<|im_start|>", "<|im_end|>") if chat_template else ())]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < 300:
        ascii_text = "\t\n" + "".join(map(chr, range(32, 127)))
        alphabet = sorted({c for piece, _ in level.pre_tokenize_str(ascii_text) for c in piece})
    if vocab_size < len(specials) + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size} is below {len(specials) + len(alphabet)}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True) for s in specials],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    words = [a + b for i, a in enumerate(syllables) for b in syllables[i % 7 :: 7]]
    corpus = ["What is the sum of 1 and 2? The answer is 3.\n", " ".join(words)]
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>" if chat_template else "</s>",
        unk_token="<unk>",
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)
