"""Maps and the quality report against whole models in memory, hooks and every basis vector."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from commands import write_seeds
from pkt.api import prepare_quality
from pkt.methods.semalign import QualityTask, run_quality
from pkt.methods.semalign.heads import open_heads, pair_maps

FAMILIES = ["llama", "qwen2", "gemma3", "gpt_neox"]
VOCAB = 160
TEXTS = [
    {"text": f"What is the sum of {i} and {i * i}? The answer is {i + i * i}."} for i in range(9)
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Teacher and student of a family, the tokenizer smaller than the heads, and texts."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, size in enumerate(("teacher", "student")):
        # The head of Gemma is its embedding; the others have one each.
        tiny.build(request.param, folder / size, size, vocab=VOCAB, seed=seed)
        tiny.write_tokenizer(folder / size, 128)
    return folder, write_seeds(folder / "seeds.jsonl", TEXTS)


def prepared(pair: Any, **options: Any) -> QualityTask:
    folder, seeds = pair
    return prepare_quality(
        str(folder / "teacher"), str(folder / "student"), seeds=seeds, dtype="float32", **options
    )


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dense_head(model: PreTrainedModel, tokens: int, fold: bool) -> torch.Tensor:
    """Rows of tokens, each family's norm written out."""
    head = model.get_output_embeddings().weight[:tokens].detach().double()
    if not fold:
        return head
    kind = model.config.model_type
    if kind == "gpt_neox":
        head = head * model.gpt_neox.final_layer_norm.weight.detach().double()
        return head - head.mean(1, keepdim=True)
    gain = model.model.norm.weight.detach().double()
    return head * (1 + gain if kind.startswith("gemma") else gain)


def dense_map(name: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    s_t, s_s = (
        torch.from_numpy(np.linalg.pinv(w.numpy(), rcond=1e-12)) for w in (teacher, student)
    )
    if name == "dual":
        return s_s @ teacher
    return (s_s / s_s.norm(dim=0)) @ (s_t / s_t.norm(dim=0)).T


def layer_outputs(model: PreTrainedModel, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """What leaves each decoder layer, (n, D), by hooks."""
    stack = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    hooks = [layer.register_forward_hook(note) for layer in stack]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("fold", [True, False])
def test_maps_against_every_basis_vector(pair: Any, fold: bool) -> None:
    folder, _ = pair
    task = prepared(pair)
    tokens = task.shared.teacher_tokens
    assert task.shared.same
    assert tokens < VOCAB, "padding rows are left out"
    opened = partial(open_heads, task.teacher, task.student, task.shared)
    made = pair_maps(
        ("cosine", "dual", "embedding"), opened(fold_norm=fold), partial(opened, end="embedding")
    )
    models = [whole(folder / role) for role in ("teacher", "student")]
    heads = [dense_head(model, tokens, fold) for model in models]
    rows = [m.get_input_embeddings().weight[:tokens].detach().double() for m in models]
    for name, found in made.maps.items():
        given = rows if name == "embedding" else heads
        expected = dense_map("cosine" if name == "embedding" else name, *given)
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < 1e-6, (name, error)
    for role, head in zip(("teacher", "student"), heads, strict=True):
        values = torch.linalg.svdvals(head)
        values = values[values > 1e-9 * values[0]]
        condition = float(values[0] / values[-1]) ** 2
        assert made.heads[role]["condition"] == pytest.approx(condition, rel=1e-6)
        assert made.heads[role]["rank"] == len(values)


def test_report_against_whole_models(pair: Any) -> None:
    """Logit lens and CKA of states that hooks took from models in memory."""
    folder, _ = pair
    task = prepared(pair, maps=("cosine", "dual"))
    found = run_quality(task).found
    models = [whole(folder / role) for role in ("teacher", "student")]
    states: list[list[torch.Tensor]] = []
    for model, texts in zip(models, (task.teacher_texts, task.student_texts), strict=True):
        kept = []
        for sample, positions in zip(texts.samples, texts.positions, strict=True):
            outputs = layer_outputs(model, sample.tokens)
            kept.append([output[list(positions)] for output in outputs])
        states.append([torch.cat(layer).double() for layer in zip(*kept, strict=True)])
    heads = [dense_head(model, task.shared.teacher_tokens, True) for model in models]
    count = task.states // 2
    judged = torch.arange(count) * task.states // count
    for name, each in found["maps"].items():
        matrix = dense_map(name, *heads)
        for index, pairing in enumerate(found["pairs"]):
            h = states[0][pairing["teacher"] - 1][judged]
            z, mapped = h @ heads[0].T, h @ matrix.T @ heads[1].T
            cosine = torch.cosine_similarity(
                z - z.mean(1, keepdim=True), mapped - mapped.mean(1, keepdim=True)
            )
            assert each["cosine"][index] == pytest.approx(float(cosine.mean()), abs=1e-5)
            agree = (z.argmax(1) == mapped.argmax(1)).double().mean()
            assert each["top1"][index] == pytest.approx(float(agree), abs=1e-9)
    for t, s in ((0, 0), (2, 1), (3, 2)):
        expected = unbiased_cka(states[0][t], states[1][s])
        assert found["similarity"][t][s] == pytest.approx(expected, abs=1e-5)


def unbiased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(x)
    ones = torch.ones(n, dtype=torch.float64)

    def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
        k, l = (m - torch.diag(m.diagonal()) for m in (k, l))  # noqa: E741
        total = (k @ l).trace() + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))

    a, b = x @ x.T, y @ y.T
    return float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt())


def test_positions_are_those_before_tokens_that_count(pair: Any) -> None:
    task = prepared(pair, limit=3)

    def places() -> Iterator[tuple[int, bool]]:
        texts = task.teacher_texts
        for sample, positions in zip(texts.samples, texts.positions, strict=True):
            yield from ((p, sample.loss_mask[p + 1]) for p in positions)

    assert all(p > 0 and counts for p, counts in places())
    assert task.teacher_texts.positions == task.student_texts.positions
    assert task.states == sum(len(s.tokens) - 2 for s in task.seeds.samples), "all but two of each"
