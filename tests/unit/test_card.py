import os
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pkt.card import model_card

MODEL = {"family": "llama", "layers": 3, "config_sha256": "c" * 64, "headers_sha256": "d" * 64}
MANIFEST = {
    "format": 1,
    "pkt": "0.1.0",
    "method": "seeking",
    "teacher": MODEL | {"layers": 5},
    "student": MODEL,
    "seeds": {"count": 32, "tokens": 5000, "loss_tokens": 4968, "sha256": "e" * 64},
    "options": {"select": "window", "rank": 16, "max_tokens": 2048, "embeddings": False},
    "loss": 1.09,
    "layer_scores": [3.0, 1.0, 2.0, 0.5, 2.5],
    "layers": [0, 2, 4],
    "windows": {},
}


def test_hub_id_is_named_in_the_front_matter():
    card = ModelCard(model_card(MANIFEST, "meta-llama/Llama-2-7b-hf"))
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "meta-llama/Llama-2-7b-hf",
        "tags": ["lora", "pkt", "seeking"],
    }
    assert "](https://huggingface.co/meta-llama/Llama-2-7b-hf)" in card.text


@pytest.mark.parametrize(
    "folder", ["/home/someone/models/llama|`7b`", "./models/my model/", "../other", "a/b/c", "{x}"]
)
def test_folder_is_named_by_its_last_part_in_the_text_alone(folder):
    text = model_card(MANIFEST, folder)
    card = ModelCard(text)
    assert "base_model" not in card.data.to_dict()
    assert "someone" not in text
    assert os.getcwd() not in text
    literal = re.search(r"^STUDENT = (.+)$", text, re.MULTILINE)[1]
    assert yaml.safe_load(literal) == os.path.basename(os.path.abspath(folder))


def test_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in ModelCard(model_card(MANIFEST, "org/model")).data.to_dict()
    monkeypatch.chdir(tmp_path / "org" / "model")
    assert "`model`" in model_card(MANIFEST, ".")


def test_an_id_that_yaml_would_read_as_a_number_stays_text():
    assert ModelCard(model_card(MANIFEST, "1e5")).data.base_model == "1e5"


def test_table_holds_what_was_asked_and_found():
    text = model_card(MANIFEST, "org/model")
    for row in ("| max-tokens | 2048 |", "| embeddings | false |", "| select | window |"):
        assert row in text
    assert "32 texts, 4968 of 5000 tokens in the loss" in text
    assert "0, 2, 4" in text
    assert text == model_card(dict(reversed(MANIFEST.items())), "org/model")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_the_code_of_the_card_starts_at_the_students_function(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 24}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    student = LlamaForCausalLM(config).eval()
    student.save_pretrained(tmp_path / "student")
    tokens = torch.arange(12)[None]
    expected = student(tokens).logits.detach()
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    start = get_peft_model(student, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    for name, parameter in start.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    start.save_pretrained(tmp_path / "start", save_embedding_layers=False)

    code = re.search(r"```python\n(.+?)```", model_card(MANIFEST, "org/model"), re.DOTALL)[1]
    code = code.replace('"org/model"', repr(str(tmp_path / "student")))
    code = code.replace('"."', repr(str(tmp_path / "start")))
    names = {}
    exec(code, names)

    model = names["model"].eval()
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * (3 * 2 + 2)
    with model.disable_adapter():
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-2)
