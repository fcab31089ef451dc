"""Training against the paper's own procedure, and the product against plain PEFT.

Laws: at step 0 the student with its start is the student; the residual base W − B₀A₀ with a LoRA
that begins at BA, trained by plain torch, goes the same way; the exported adapter on the untouched
student is the trained model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import pkt
import tiny
from pkt.adapter import read_factors
from pkt.api import prepare_training
from pkt.methods.tuning.model import begin, load_student
from pkt.records import LowRank
from pkt.training import compare_logits, first_logits, inject
from test_extract import build_pair, write_seeds

RANK = 4
CASES = [
    *((family, tied, dtype, True) for family in tiny.FAMILIES
      for tied, dtype in ((True, torch.float32), (False, torch.bfloat16))),
    *((family, None, torch.float32, False) for family in tiny.FAMILIES),
    *(("llama", tied, dtype, embeddings) for tied in (True, False)
      for dtype in (torch.float32, torch.bfloat16) for embeddings in (True, False)),
]  # fmt: skip


def extracted(folder: Path, family: str, embeddings: bool = False, **both: Any) -> dict[str, Path]:
    """A pair, its texts and its start."""
    teacher, student = build_pair(folder, family, family, **both)
    seeds = write_seeds(folder / "seeds.jsonl", count=8)
    pkt.extract(
        str(teacher), str(student), seeds, folder / "start", rank=RANK, embeddings=embeddings,
        template="none", layers="last",
    )  # fmt: skip
    return {"student": student, "data": seeds, "init": folder / "start"}


def options(**changed: Any) -> dict[str, Any]:
    return {
        "template": "none", "max_steps": 3, "batch_size": 4, "micro_batch": 2, "lr": 3e-3,
        "gradient_checkpointing": False, **changed,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")  # PEFT, of a merge nobody makes
@pytest.mark.parametrize(("family", "tied", "dtype", "embeddings"), CASES)
def test_step_zero_is_the_student_and_the_export_is_what_was_trained(
    tmp_path, family, tied, dtype, embeddings
):
    paths = extracted(tmp_path, family, embeddings, tied=tied, dtype=dtype)
    task = prepare_training(
        str(paths["student"]), paths["data"], init=str(paths["init"]), **options()
    )
    samples = task.samples.samples
    base = load_student(paths["student"], dtype, torch.device("cpu"))
    before = first_logits(base, samples)
    halves = begin(task, base)
    assert (len(halves.trained) == 2 + len(task.student.checkpoint.layers) * 7) or not (
        embeddings and family == "llama"
    )
    model = inject(base, halves.trained, halves.frozen, dropout=0.5)
    zero = compare_logits(before, first_logits(model, samples), dtype, 3)
    assert zero.difference <= (1e-5 if dtype == torch.float32 else zero.bound)
    start_alone = inject(
        load_student(paths["student"], dtype, torch.device("cpu")), halves.trained, None
    )
    moved = compare_logits(before, first_logits(start_alone, samples), dtype, 3)
    assert moved.difference > 10 * max(zero.difference, 1e-3)  # the start is not nothing

    made = pkt.train(
        str(paths["student"]), paths["data"], tmp_path / "out", init=str(paths["init"]), **options()
    )
    assert made.manifest["export"]["difference"] <= made.manifest["export"]["bound"]
    # A process that knows PEFT alone.
    plain = AutoModelForCausalLM.from_pretrained(paths["student"], dtype=dtype)
    served = PeftModel.from_pretrained(plain, tmp_path / "out")
    after = compare_logits(before, first_logits(served, samples), dtype, 3)
    assert after.difference > 1e-4  # it has learned something
    losses = [row["loss"] for row in made.metrics if "loss" in row]
    assert len(losses) == 3


@pytest.mark.parametrize("form", ["residual", "scaled:0.25", "a-only"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", None), ("gemma3", None)])
def test_against_the_paper_with_plain_torch(tmp_path, family, tied, form):
    paths = extracted(tmp_path, family, tied=tied)
    steps, lr = 20, 2e-3
    held = options(max_steps=steps, lr=lr, dropout=0.0, warmup=0.1, start=form)
    made = pkt.train(
        str(paths["student"]), paths["data"], tmp_path / "out", init=str(paths["init"]), **held
    )
    ours = [row["loss"] for row in made.metrics]
    task = prepare_training(str(paths["student"]), paths["data"], init=str(paths["init"]), **held)
    samples = task.samples.samples
    wanted, final = by_hand(paths["student"], read_factors(paths["init"]), samples, form, steps, lr)
    assert ours == pytest.approx(wanted, rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(paths["student"], dtype=torch.float32)
    served = PeftModel.from_pretrained(plain, tmp_path / "out")
    for one, other in zip(first_logits(served, samples), final, strict=True):
        assert (one - other).abs().max() <= 1e-4


class Residual(nn.Module):
    """y = (W − B₀A₀) x + B A x, the paper's layer, with parameters of its own."""

    def __init__(self, linear: nn.Linear, start: Any, form: str) -> None:
        super().__init__()
        b, a = start.b.clone(), start.a.clone()
        self.base = linear.requires_grad_(False)
        if form == "a-only":
            a, b = F.normalize(a, dim=1) / 3**0.5, torch.zeros_like(b)
        else:
            scale = float(form.partition(":")[2] or 1) ** 0.5
            a, b = a * scale, b * scale
            self.base.weight -= b @ a
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def by_hand(
    student: Path, start: Any, samples: Any, form: str, steps: int, lr: float
) -> tuple[list[float], list[torch.Tensor]]:
    """The loss of each step and the final logits, without Trainer, PEFT or pkt's layers."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.requires_grad_(False)
    layers = []
    with torch.no_grad():
        for name, half in start.items():
            parent, _, leaf = name.rpartition(".")
            layer = Residual(model.get_submodule(name), half, form)
            setattr(model.get_submodule(parent), leaf, layer)
            layers.append(layer)
    factors = [p for layer in layers for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(factors, lr=lr, weight_decay=0.0)
    warm = -(-steps // 10)
    losses: list[float] = []
    for step, batch in zip(range(steps), batches(samples, 4, 0), strict=False):
        rate = step / warm if step < warm else (steps - step) / (steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        total = sum(sample.loss_tokens for sample in batch)
        summed = torch.zeros(())
        for sample in batch:
            logits = model(input_ids=torch.tensor([sample.tokens])).logits[0]
            mask = torch.tensor(sample.loss_mask)[1:]
            wanted = torch.tensor(sample.tokens)[1:][mask]
            summed = summed + F.cross_entropy(logits[:-1][mask], wanted, reduction="sum")
        loss = summed / total
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first_logits(model, samples)


def batches(samples: Any, size: int, seed: int) -> Any:
    """The Trainer's own order: a permutation for each epoch, drawn from the seed plus the epoch."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(samples), generator=generator).tolist()
        for first in range(0, len(order), size):
            yield [samples[index] for index in order[first : first + size]]
        epoch += 1


def test_dropout_leaves_the_frozen_half_alone(tmp_path):
    """In training mode the change of a layer is −B₀A₀x plus what dropout left of BA, scaled."""
    paths = extracted(tmp_path, "llama")
    task = prepare_training(
        str(paths["student"]), paths["data"], init=str(paths["init"]), **options()
    )
    base = load_student(paths["student"], torch.float32, torch.device("cpu"))
    halves = begin(task, base)
    model = inject(base, halves.trained, halves.frozen, dropout=0.5).train()
    name = next(iter(halves.trained))
    layer, half = model.get_submodule(f"base_model.model.{name}"), halves.trained[name]
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()  # the trained half is silent
    x = torch.randn(3, half.a.shape[1])
    found = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(found, -x @ half.a.T @ half.b.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_layer_are_those_of_its_formula(tmp_path, dropout, dtype):
    """A layer with a start beside the same expression left to autograd, dropout drawn alike."""
    base = load_student(tiny.build("qwen2", tmp_path), dtype, torch.device("cpu"))
    name = "model.layers.0.self_attn.q_proj"  # one with a bias
    plain = base.get_submodule(name)
    out, width = plain.weight.shape
    torch.manual_seed(3)
    trained, frozen = (LowRank(torch.randn(out, 4), torch.randn(4, width)) for _ in range(2))
    model = inject(base, {name: trained}, {name: frozen}, dropout).train()
    layer = model.get_submodule(f"base_model.model.{name}")
    x = torch.randn(2, 7, width, dtype=dtype, requires_grad=True)
    parts = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    upstream = torch.randn(2, 7, out, dtype=dtype)
    torch.manual_seed(5)
    found = layer(x)
    gradients = torch.autograd.grad(found, parts, upstream)
    torch.manual_seed(5)
    wide = x.float()
    dropped = torch.native_dropout(wide.reshape(-1, width), dropout, True)[0].view_as(wide)
    change = dropped @ parts[1].T @ parts[2].T - wide @ frozen.a.T @ frozen.b.T
    wanted = (layer.base_layer(x) + change).to(dtype)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1, "rtol": 0.02}
    for one, other in zip(
        (found, *gradients), (wanted, *torch.autograd.grad(wanted, parts, upstream)), strict=True
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("init", ["lora", "pissa", "gaussian"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_controls_adapt_the_same_modules_as_the_extraction(tmp_path, init, embeddings):
    paths = extracted(tmp_path, "llama", embeddings, tied=False)
    given = (str(paths["student"]), paths["data"])
    seeking = pkt.train(*given, tmp_path / "a", init=str(paths["init"]), **options())
    control = pkt.train(
        *given, tmp_path / "b", init=init, rank=RANK, embeddings=embeddings, **options()
    )
    counts = [made.run["trainable_parameters"] for made in (seeking, control)]
    assert counts[0] == counts[1]
    ranks = {n: h.a.shape[0] for n, h in read_factors(tmp_path / "b").items()}
    theirs = {n: h.a.shape[0] for n, h in read_factors(tmp_path / "a").items()}
    expected = theirs if init != "lora" else {n: rank // 2 for n, rank in theirs.items()}
    assert ranks == expected
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
