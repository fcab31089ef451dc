"""Exports against plain PEFT: what is written computes what student and adapter do.

Laws, within 1e-4 of a logit in float32: a residual base with its start is the student; what any
loop trains on it is, exported, the same on the untouched student; a merged model is student plus
adapter, in the student's files, tied or parted; in bfloat16 it is W + Δ rounded once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pkt
import tiny
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
pytestmark = [  # PEFT, of a merge nobody makes, and of base weights that it saves along
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
    pytest.mark.filterwarnings("ignore:.*tied.*"),
]

RANK = 4
IDS = torch.tensor([[1, 17, 30, 5, 99, 64, 2, 41, 3, 77, 120]])
LINEAR = {"phi3": ("qkv_proj", "down_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}
ENDS = {"gpt_neox": ("embed_in", "embed_out")}
GRID = [("llama", tied, dtype, ends) for tied in (True, False)
        for dtype in (torch.float32, torch.bfloat16) for ends in (True, False)]  # fmt: skip


def linear(family: str) -> tuple[str, ...]:
    return LINEAR.get(family.removesuffix("_sequential"), ("q_proj", "v_proj", "down_proj"))


def both_ends(family: str) -> tuple[str, ...]:
    return ENDS.get(family.removesuffix("_sequential"), ("embed_tokens", "lm_head"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits[0].float()
    return found


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= 1e-4


def random_adapter(student: Path, folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter of random factors with plain PEFT; the logits of student plus adapter."""
    model = get_peft_model(load(student), LoraConfig(task_type="CAUSAL_LM", **config))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15, generator=draw)
    model.save_pretrained(folder)
    return logits(model)


def extracted(folder: Path, family: str, **options: Any) -> tuple[Path, Path]:
    """A student and a start for it."""
    embeddings = options.pop("embeddings", False)
    teacher, student = build_pair(folder, family, family, **options)
    seeds = write_seeds(folder / "seeds.jsonl", count=2)
    pkt.extract(
        str(teacher), str(student), seeds, folder / "start", rank=RANK, embeddings=embeddings,
        template="none", layers="last",
    )  # fmt: skip
    return student, folder / "start"


def train(base: Any) -> torch.Tensor:
    """Somebody's own loop: a few steps on the factors; the logits afterwards."""
    trained = [p for p in base.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(4):
        loss = base(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(base)


def tensors(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Name → file, dtype and shape, in the order of the files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.offset_keys():
                part = file.get_slice(name)
                found[name] = (path.name, part.get_dtype(), tuple(part.get_shape()))
    return found


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "ends"),
    [*GRID, *((family, tied, dtype, True) for family in tiny.FAMILIES if family != "llama"
              for tied, dtype in ((True, torch.float32), (False, torch.bfloat16)))],
)  # fmt: skip
def test_a_plain_adapter_is_merged(tmp_path, family, tied, dtype, ends):
    student = tiny.build(
        family, tmp_path / "s", "student", vocab=128, tied=tied, dtype=dtype, shards=3
    )
    tiny.write_tokenizer(student, 128, chat_template=tiny.CHATML)
    targets = linear(family) + (both_ends(family) if ends else ())
    wanted = random_adapter(
        student, tmp_path / "a", r=RANK, lora_alpha=6, target_modules=list(targets)
    )
    exact = pkt.export(tmp_path / "a", "merged", tmp_path / "m32", dtype="float32")
    near(logits(load(tmp_path / "m32")), wanted)
    assert exact.manifest["check"]["difference"] <= 1e-4
    assert max(exact.errors.values()) < 1e-5

    kept = pkt.export(tmp_path / "a", "merged", tmp_path / "kept")
    parted = tied and ends
    assert json.loads((tmp_path / "kept/config.json").read_text()).get(
        "tie_word_embeddings"
    ) == (False if parted else json.loads((student / "config.json").read_text()).get(
        "tie_word_embeddings"))  # fmt: skip
    before, after = tensors(student), tensors(tmp_path / "kept")
    assert list(after)[: len(before)] == list(before), "the order of the files"
    assert all(after[name] == entry for name, entry in before.items())
    assert len(after) - len(before) == int(parted)
    index = json.loads((tmp_path / "kept/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry[0] for name, entry in after.items()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (student / name).read_bytes()
    assert (tmp_path / "kept/chat_template.jinja").read_text() == tiny.CHATML

    # Element by element: W + Δ rounded once, and everything else as it was, byte for byte.
    deltas = {}
    peft = PeftModel.from_pretrained(load(student), tmp_path / "a")
    for name, module in peft.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and module.r:
            deltas[f"{name}.weight"] = module.get_delta_weight("default").detach()
    assert len(deltas) == len(kept.errors)
    old, new = values(student), values(tmp_path / "kept")
    for name, value in new.items():
        base = old.get(name, old[next(n for n in old if both_ends(family)[0] in n)])
        if (delta := deltas.pop(name, None)) is None:
            assert torch.equal(value.view(torch.uint8), base.view(torch.uint8)), name
        else:
            expected = base.float() + delta
            ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
            room = ulp * (base.float().abs() + delta.abs()) + 1e-7
            assert bool(((value.float() - expected).abs() <= room).all()), name
            module = name.removesuffix(".weight")
            error = float((value.double() - expected.double()).norm() / delta.double().norm())
            if dtype == torch.bfloat16:
                assert kept.errors[module] == pytest.approx(error, rel=1e-3)
                assert error > 1e-4
    assert not deltas
    near_bound = 1e-4 if dtype == torch.float32 else float(wanted.abs().max()) * 0.25
    assert float((logits(load(tmp_path / "kept")) - wanted).abs().max()) <= near_bound


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in tiny.FAMILIES),
        *((family, {"embeddings": True, "tied": tied, "dtype": dtype})
          for family, tied, dtype in (("llama", True, torch.bfloat16), ("llama", False, None),
                                      ("gemma2", True, None), ("gpt_neox", False, None))),
    ],
)  # fmt: skip
def test_a_start_goes_out_and_what_was_trained_from_it_comes_back(tmp_path, family, options):
    options = {key: value for key, value in options.items() if value is not None}
    student, start = extracted(tmp_path, family, **options)
    made = pkt.export(start, "residual", tmp_path / "out")
    assert made.manifest["check"]["difference"] <= 1e-4
    base = load(tmp_path / "out/base")
    assert next(base.parameters()).dtype == torch.float32
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter", is_trainable=True)
    near(logits(model), logits(load(student)))
    wanted = train(model)
    assert float((wanted - logits(load(student))).abs().max()) > 1e-2
    model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert any("base_layer" in name for name in stored) == ("embeddings" in options)

    served = pkt.export(tmp_path / "theirs", "lora", tmp_path / "lora", extracted=start)
    assert served.manifest["rank"] == 2 * RANK
    near(logits(PeftModel.from_pretrained(load(student), tmp_path / "lora")), wanted)
    pkt.export(tmp_path / "theirs", "merged", tmp_path / "merged", extracted=start, dtype="float32")
    near(logits(load(tmp_path / "merged")), wanted)
    # The residual base is a base like any other: merged there, it is the same model once more.
    pkt.export(tmp_path / "theirs", "merged", tmp_path / "there")
    near(logits(load(tmp_path / "there")), wanted)
    # What was exported is an ordinary LoRA of the student: it goes through again.
    pkt.export(tmp_path / "lora", "lora", tmp_path / "small", rank=2 * RANK)
    near(logits(PeftModel.from_pretrained(load(student), tmp_path / "small")), wanted)


SCALED: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"q_proj": 3},
    },
    "patterns, rslora": {
        "r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {r"layers\.[02]\.mlp.*": 5},
        "alpha_pattern": {r".*\.v_proj": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_every_scaling_of_peft_is_honoured(tmp_path, case, to):
    student = tiny.build("llama", tmp_path / "s", "student", vocab=128)
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], **SCALED[case]}
    wanted = random_adapter(student, tmp_path / "a", **config)
    pkt.export(tmp_path / "a", to, tmp_path / "out")
    if to == "merged":
        near(logits(load(tmp_path / "out")), wanted)
    else:
        near(logits(PeftModel.from_pretrained(load(student), tmp_path / "out")), wanted)
        written = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert written["r"] == written["lora_alpha"]
        assert written["rank_pattern"] == written["alpha_pattern"]


def test_modules_that_only_one_side_has_keep_their_part(tmp_path):
    """On the residual base somebody trains a new adapter, over other modules than the start's."""
    student, start = extracted(tmp_path, "llama")
    pkt.export(start, "residual", tmp_path / "out")
    model = load(tmp_path / "out/base")
    targets = r"model\.layers\.([01]\.self_attn\.[qv]_proj|2\.mlp\.up_proj)|lm_head"
    wanted_model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    )
    for name, parameter in wanted_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    wanted = logits(wanted_model)
    wanted_model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    pkt.export(tmp_path / "theirs", "lora", tmp_path / "lora", extracted=start)
    near(logits(PeftModel.from_pretrained(load(student), tmp_path / "lora")), wanted)
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    ranks = {re.sub(r".*?(\d.*|lm_head)\.lora_A.*", r"\1", name): tensor.shape[0]
             for name, tensor in factors.items() if "lora_A" in name}  # fmt: skip
    assert ranks["0.self_attn.q_proj"] == RANK + 3
    assert ranks["2.self_attn.q_proj"] == RANK
    assert ranks["lm_head"] == 3


def test_a_checkpoint_that_spells_its_names_without_prefix(tmp_path):
    """Saved from the bare base model: "layers.0…", no head of its own, tied."""
    student = tiny.build("llama", tmp_path / "s", "student", vocab=128, tied=True)
    bare = load(student).model
    bare.save_pretrained(tmp_path / "bare")
    config = json.loads((student / "config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps(config))
    assert "embed_tokens.weight" in tensors(tmp_path / "bare")
    for number, targets in enumerate((["q_proj"], ["q_proj", "lm_head"], ["embed_tokens"])):
        adapter, out = tmp_path / f"a{number}", tmp_path / f"m{number}"
        wanted = random_adapter(tmp_path / "bare", adapter, r=2, lora_alpha=4,
                                target_modules=targets)  # fmt: skip
        pkt.export(adapter, "merged", out)
        near(logits(load(out)), wanted)


def test_head_and_embedding_both_stored_although_tied(tmp_path):
    student = tiny.build("llama", tmp_path / "s", "student", vocab=128, tied=True)
    stored = values(student)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    from safetensors.torch import save_file

    save_file(stored, student / "model.safetensors", metadata={"format": "pt"})
    wanted = random_adapter(student, tmp_path / "a", r=2, lora_alpha=4,
                            target_modules=["lm_head", "o_proj"])  # fmt: skip
    pkt.export(tmp_path / "a", "merged", tmp_path / "m")
    near(logits(load(tmp_path / "m")), wanted)


def test_a_trained_run_is_merged_and_recompressed(tmp_path):
    """pkt extract, pkt train, pkt export: the whole way."""
    student, start = extracted(tmp_path, "llama", tied=True)
    pkt.train(
        str(student), tmp_path / "seeds.jsonl", tmp_path / "tuned", init=str(start),
        template="none", max_steps=3, batch_size=2, lr=3e-3, gradient_checkpointing=False,
    )  # fmt: skip
    wanted = logits(PeftModel.from_pretrained(load(student), tmp_path / "tuned"))
    made = pkt.export(tmp_path / "tuned", "merged", tmp_path / "merged")
    near(logits(load(tmp_path / "merged")), wanted)
    assert not made.manifest["parted"]
    small = pkt.export(tmp_path / "tuned", "lora", tmp_path / "small", rank=RANK)
    assert small.manifest["rank"] == RANK
    tuned = load_file(tmp_path / "tuned/adapter_model.safetensors")
    for module, error in small.errors.items():
        key = f"base_model.model.{module}.lora_"
        product = tuned[f"{key}B.weight"].double() @ tuned[f"{key}A.weight"].double()
        sigma = torch.linalg.svdvals(product)
        wanted_error = float(sigma[RANK:].norm() / sigma.norm())
        assert error == pytest.approx(wanted_error, rel=1e-4, abs=1e-6)
