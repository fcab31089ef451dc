"""The reference against cases that can be worked out by hand or by a dumber program."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import reference
import tiny

torch.set_num_threads(1)
F64 = torch.float64


class Toy(nn.Module):
    """Logits of the next token = W · one_hot(token) + b: nothing but a table, W (2, 2)."""

    def __init__(self, weight: list[list[float]], bias: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=F64)
        self.linear.weight.data = torch.tensor(weight, dtype=F64)
        self.linear.bias.data = torch.tensor(bias, dtype=F64)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Return the logits (batch, tokens, 2)."""
        assert not use_cache
        return SimpleNamespace(logits=self.linear(torch.eye(2, dtype=F64)[input_ids]))


def test_scores_of_a_table_by_hand() -> None:
    """With p = σ(z_0 - z_1) of token 0, target 1: ∂L/∂z = (p, -p)."""
    toy = Toy([[0.7, -0.2], [0.3, 0.5]], [0.1, -0.4])
    losses, scores = reference.losses_and_scores(toy, [([0, 1], [False, True])])
    z0, z1 = 0.7 + 0.1, 0.3 - 0.4
    p = 1 / (1 + math.exp(z1 - z0))
    assert losses[0] == pytest.approx(-math.log(1 - p), rel=1e-12)
    want = torch.tensor([[0.7 * p, 0.0], [0.3 * p, 0.0]], dtype=F64)  # token 1 was no input
    torch.testing.assert_close(scores["linear.weight"], want)
    torch.testing.assert_close(scores["linear.bias"], torch.tensor([0.1 * p, 0.4 * p], dtype=F64))


def test_absolute_values_are_taken_in_each_seed() -> None:
    """Two seeds whose gradients cancel: |g1 + g2| = 0, |g1| + |g2| is not."""
    toy = Toy([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0])
    seeds = [([0, 0], [False, True]), ([0, 1], [False, True])]
    _, scores = reference.losses_and_scores(toy, seeds)
    want = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=F64)  # p = 1/2 in either seed
    torch.testing.assert_close(scores["linear.weight"], want)
    toy.zero_grad()
    sum(reference.seed_loss(toy, *seed) for seed in seeds).backward()
    assert float(toy.linear.weight.grad.abs().max()) < 1e-15


def test_only_masked_tokens_count_and_the_first_never_does() -> None:
    toy = Toy([[0.7, -0.2], [0.3, 0.5]], [0.1, -0.4])
    whole = reference.seed_loss(toy, [0, 1, 1], [True, True, True])
    parts = [
        reference.seed_loss(toy, [0, 1, 1], mask)
        for mask in ([False, True, False], [True, False, True])
    ]
    assert whole.item() == pytest.approx(sum(p.item() for p in parts) / 2)
    with pytest.raises(ValueError, match="no token to predict"):
        reference.seed_loss(toy, [0, 1], [True, False])


@pytest.mark.parametrize("tied", [False, True])
def test_scores_against_finite_differences(tied: bool, tmp_path: Path) -> None:
    """GPT-NeoX with sdpa stays in float64 all the way (RMS norms of the others go through f32)."""
    tiny.build("gpt_neox", tmp_path, "student", tied=tied, layers=2)
    seeds = tiny.random_seeds(96, 2)
    losses, scores = reference.seed_losses_and_scores(tmp_path, seeds)
    model = reference.load(tmp_path)
    assert ("lm_head.weight" in scores) is not tied
    step = 1e-5
    with torch.no_grad():
        assert losses[1] == float(reference.seed_loss(model, *seeds[1]))
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            i = int(scores[name].argmax())
            theta = float(flat[i])
            want = 0.0
            for seed in seeds:
                flat[i] = theta + step
                up = float(reference.seed_loss(model, *seed))
                flat[i] = theta - step
                down = float(reference.seed_loss(model, *seed))
                flat[i] = theta
                want += abs(theta * (up - down) / (2 * step))
            assert float(scores[name].flatten()[i]) == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_a_padding_row_of_the_embedding_has_no_gradient(tmp_path: Path) -> None:
    """nn.Embedding(padding_idx=0) gives row 0 none even where token 0 is read (here: OLMo 2)."""
    tiny.build("olmo2", tmp_path, "student")
    seeds = [([5, 0, 7, 8], [False, True, True, True])]
    _, scores = reference.seed_losses_and_scores(tmp_path, seeds)
    read = scores["model.embed_tokens.weight"].sum(1).nonzero().flatten().tolist()
    assert read == [5, 7]  # 8 is predicted, never read
    assert scores["lm_head.weight"][0].sum() > 0


def test_layer_scores_and_picks_by_hand() -> None:
    scores = {f"model.layers.{i}.w": torch.full((2, 2), float(i % 3)) for i in range(12)}
    scores["model.layers.1.norm.weight"] = torch.tensor([0.5, 0.25])
    scores["model.norm.weight"] = torch.tensor([100.0])
    totals = reference.layer_scores(scores, "model.layers.", 12)
    assert totals.tolist() == [0, 4.75, 8, 0, 4, 8, 0, 4, 8, 0, 4, 8]
    assert reference.pick_layers(totals, 3) == [2, 5, 8]
    assert reference.pick_layers(totals, 6) == [1, 2, 4, 5, 8, 11]
    with pytest.raises(ValueError, match="the teacher has 12 layers, the student 13"):
        reference.pick_layers(totals, 13)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("select", ["window", "rows-cols", "top-weights"])
def test_extract_fits_the_student(family: str, select: str, tmp_path: Path) -> None:
    teacher = tiny.build(family, tmp_path / "t", seed=1)
    student = tiny.build(family, tmp_path / "s", "student", seed=2)
    seeds = tiny.random_seeds(96, 3)
    found = reference.extract(teacher, student, seeds, 4, select=select, embeddings=True)
    model = reference.load(student)
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    assert set(found["modules"]) == linears
    assert found["layers"] == [0, 2, 3]  # not the first three: tiny.QUIET is left out
    for name, module in found["modules"].items():
        assert module["weight"].shape == model.get_submodule(name).weight.shape
        f = module["factors"]
        assert f.sigma.shape == (4,)
        weight = module["weight"].T if "embed" in name else module["weight"]
        assert (f.b.shape[0], f.a.shape[1]) == weight.shape
        assert all(pick.repeat == 1 for pick in module["parts"].values())


def test_extract_of_equal_shapes_takes_everything(tmp_path: Path) -> None:
    teacher = tiny.build("phi3", tmp_path / "t", seed=1)
    student = tiny.build("phi3", tmp_path / "s", seed=2)
    found = reference.extract(teacher, student, tiny.random_seeds(96, 2), 200, embeddings=True)
    model = reference.load(teacher)
    assert found["layers"] == [0, 1, 2, 3]
    for name, module in found["modules"].items():
        assert torch.equal(module["weight"], model.get_submodule(name).weight)
        assert all(pick.at == (0, 0) for pick in module["parts"].values())
        f = module["factors"]
        turned = module["weight"].T if "embed" in name else module["weight"]
        torch.testing.assert_close(f.b @ f.a, turned)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_kv_heads_expand_only_where_the_student_has_more(family: str, tmp_path: Path) -> None:
    teacher = tiny.build(family, tmp_path / "t", kv_heads=3)
    seeds = tiny.random_seeds(96, 2)
    for kv_heads, repeat in ((2, 1), (4, 2)):  # 24 rows against 16 and 32
        student = tiny.build(family, tmp_path / f"s{kv_heads}", "student", kv_heads=kv_heads)
        found = reference.extract(teacher, student, seeds, 4)
        fused = "self_attn.qkv_proj"
        for part in ("self_attn.k_proj", "self_attn.v_proj"):
            name = f"model.layers.1.{fused if family == 'phi3' else part}"
            pick = found["modules"][name]["parts"][part]
            assert pick.repeat == repeat
            assert pick.weight.shape == (8 * kv_heads, 32)
    wide = tiny.build(family, tmp_path / "wide", "student", hidden=64, heads=8, kv_heads=8)
    with pytest.raises(ValueError, match=r"layers\.\d\..*teacher \(48, 48\), student \(64, 64\)"):
        reference.extract(teacher, wide, seeds, 4)


def test_a_fused_student_takes_logical_parts_of_a_plain_teacher(tmp_path: Path) -> None:
    seeds = tiny.random_seeds(96, 2)
    teacher = tiny.build("llama", tmp_path / "t")
    found = {}
    for family in ("llama", "phi3"):
        student = tiny.build(family, tmp_path / family, "student")
        found[family] = reference.extract(teacher, student, seeds, 4)["modules"]
    plain = [found["llama"][f"model.layers.0.self_attn.{p}_proj"]["weight"] for p in "qkv"]
    assert torch.equal(
        found["phi3"]["model.layers.0.self_attn.qkv_proj"]["weight"], torch.cat(plain)
    )
    alien = tiny.build("gpt_neox", tmp_path / "neox", "student")
    with pytest.raises(ValueError, match="the teacher has no such module"):
        reference.extract(teacher, alien, seeds, 4)


def test_tied_teacher_gives_embedding_and_head_one_window(tmp_path: Path) -> None:
    seeds = tiny.random_seeds(96, 2)
    student = tiny.build("qwen3", tmp_path / "s", "student", tied=False)
    for tied in (True, False):
        teacher = tiny.build("qwen3", tmp_path / f"t{tied}", tied=tied)
        modules = reference.extract(teacher, student, seeds, 4, embeddings=True)["modules"]
        embedding, head = modules["model.embed_tokens"], modules["lm_head"]
        assert embedding["parts"]["model.embed_tokens"].at[0] == 0
        assert torch.equal(embedding["weight"], head["weight"]) is tied


# peft 0.21.2 still asks transformers 5.23 for a deprecated property
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_peft_makes_the_windows_out_of_the_factors(split: str, tmp_path: Path) -> None:
    """Peft 0.21.2: the delta of each module is B A (embedding: its transpose) at alpha = r."""
    from peft import LoraConfig, get_peft_model

    teacher = tiny.build("llama", tmp_path / "t")
    student = tiny.build("llama", tmp_path / "s", "student")
    seeds = tiny.random_seeds(96, 2)
    modules = reference.extract(teacher, student, seeds, 32, split, embeddings=True)["modules"]
    config = LoraConfig(r=32, lora_alpha=32, target_modules=list(modules))
    model = get_peft_model(reference.load(student), config)
    for name, module in modules.items():
        layer = model.base_model.model.get_submodule(name)
        f = module["factors"]
        with torch.no_grad():
            if "embed" in name:
                layer.lora_embedding_A["default"].copy_(f.a)
                layer.lora_embedding_B["default"].copy_(f.b)
            else:
                if f.sigma.shape[0] < 32:
                    continue
                layer.lora_A["default"].weight.copy_(f.a)
                layer.lora_B["default"].weight.copy_(f.b)
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), module["weight"], rtol=1e-4, atol=1e-5
        )
