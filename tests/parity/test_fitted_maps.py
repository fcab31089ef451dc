"""Maps fitted on paired activations against whole models in memory, hooks and explicit formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import tiny
from pkt.errors import UsageError
from pkt.records import LayerPair
from pkt.targets import FOLDER, Targets
from test_extract import write_seeds
from test_written_states import Dense, prepared, wanted_states, write
from tiny_tokenizer import write_tokenizer

torch.set_num_threads(1)
EXAMPLES = 4
PAIRS = [(1, 1), (2, 2), (4, 3)]


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_neox"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    for seed, size in enumerate(("teacher", "student")):
        tiny.build(request.param, folder / size, size, vocab=128, seed=seed)
        tiny.write_tokenizer(folder / size, 128)
    write_seeds(folder / "data.jsonl")
    dense = [Dense(request.param, folder / name) for name in ("teacher", "student")]
    return folder, dense[0], dense[1]


def terms(interface: str, teacher: int, below: int) -> dict[tuple[str, int], float]:
    """A state as a sum of activations, each model's own."""
    if interface in ("mlp", "attn", "hidden"):
        return {(interface, teacher): 1.0}
    return {("hidden", teacher): 1.0, ("hidden", below): -1.0}


def paired_states(
    pair: Any, interface: str, number: int, samples: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """X_T (n, D_T) and X_S (n, D_S) of one pair over the first examples, float64."""
    _, big, small = pair
    teacher, student = PAIRS[number]
    below = {"span": (0, *(each[0] for each in PAIRS))[number], "block": teacher - 1}
    theirs = terms(interface, teacher, below.get(interface, 0))
    ours = terms(interface, student, student - 1)
    both = [
        torch.cat([wanted_states(dense, sample, each) for sample in samples])
        for dense, each in ((big, theirs), (small, ours))
    ]
    return both[0], both[1]


def dense_ridge(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    wide = theirs.shape[1]
    ridge = 1e-2 * theirs.square().sum() / wide
    gram = theirs.T @ theirs + ridge * torch.eye(wide, dtype=torch.float64)
    return ours.T @ theirs @ torch.linalg.inv(gram)


def dense_procrustes(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    u, sigma, vh = torch.linalg.svd(ours.T @ theirs, full_matrices=False)
    return (u @ vh) * (sigma.sum() / theirs.square().sum())


@pytest.mark.parametrize("interface", ["mlp", "attn", "block", "hidden", "span"])
@pytest.mark.parametrize("name", ["ridge", "procrustes"])
def test_fitted_on_the_pairs_own_states(
    name: str, interface: str, pair: Any, tmp_path: Path
) -> None:
    folder = pair[0]
    options = {"interface": interface, "map": name, "attribution_examples": EXAMPLES}
    made = write(folder, tmp_path / "out", **options)
    task, held = prepared(folder, **options), Targets(tmp_path / "out" / FOLDER)
    assert held.pairs == tuple(LayerPair(*each) for each in PAIRS)
    samples = task.samples.samples
    dense = {"ridge": dense_ridge, "procrustes": dense_procrustes}[name]
    for number, (_, student) in enumerate(PAIRS):
        theirs, ours = paired_states(pair, interface, number, samples[:EXAMPLES])
        wanted = dense(theirs, ours)
        rows, _ = paired_states(pair, interface, number, samples)
        found = torch.cat([held.states(n, student) for n in range(len(samples))]).double()
        assert found.shape == (len(rows), 32)
        far = (found - rows @ wanted.T).norm() / (rows @ wanted.T).norm()
        assert float(far) <= 1e-5
        left = float((ours - theirs @ wanted.T).norm() / ours.norm())
        assert made.manifest["fitted"]["left"][number] == pytest.approx(left, rel=1e-4)
    assert made.manifest["fitted"]["examples"] == EXAMPLES
    assert made.manifest["states"]["fitted_on"] == EXAMPLES
    files = sorted(path.name for path in (tmp_path / "out" / "maps").iterdir())
    assert files == [f"{name}-{k:05d}.safetensors" for _, k in PAIRS]


def channels(dense: Dense, samples: Any, kind: str, absolute: bool) -> list[torch.Tensor]:
    """By layer mean |Σ_t a ∂L/∂a| of each channel (D,), by autograd through the whole model."""
    found = [torch.zeros(dense.model.config.hidden_size).double() for _ in dense.layers]
    for sample in samples:
        seen, logits = dense.run(sample.tokens)
        at = torch.tensor(sample.loss_mask).nonzero()[:, 0]
        functional.cross_entropy(logits[at - 1], torch.tensor(sample.tokens)[at]).backward()
        for layer, total in enumerate(found, 1):
            if kind == "block":
                added = seen["hidden", layer] - seen["hidden", layer - 1]
                gradient = seen["hidden", layer].grad
            else:
                added, gradient = seen[kind, layer], seen[kind, layer].grad
            product = (added.detach().double() * gradient.double())[0]
            total += (product.abs() if absolute else product).sum(0).abs() / len(samples)
    return found


@pytest.mark.parametrize("variant", ["signed", "abs"])
@pytest.mark.parametrize("interface", ["mlp", "span"])
def test_flex_takes_the_channels_the_answers_hang_on(
    interface: str, variant: str, pair: Any, tmp_path: Path
) -> None:
    folder, big, _ = pair
    options = {
        "interface": interface, "map": "flex", "attribution": variant,
        "attribution_examples": EXAMPLES,
    }  # fmt: skip
    made = write(folder, tmp_path / "out", **options)
    task, held = prepared(folder, **options), Targets(tmp_path / "out" / FOLDER)
    samples = task.samples.samples
    kind = "mlp" if interface == "mlp" else "block"
    scores = channels(big, samples[:EXAMPLES], kind, variant == "abs")
    for number, (teacher, student) in enumerate(PAIRS):
        theirs, ours = paired_states(pair, interface, number, samples[:EXAMPLES])
        kept = scores[teacher - 1].topk(32).indices.sort().values
        scale = ours.norm() / theirs[:, kept].norm()
        rows, _ = paired_states(pair, interface, number, samples)
        found = torch.cat([held.states(n, student) for n in range(len(samples))]).double()
        wanted = scale * rows[:, kept]
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    assert "channels" not in made.manifest["attribution"]
    assert (tmp_path / "out" / "report" / "attribution.png").exists()


def test_states_of_two_tokenizers_are_paired_where_both_end_together(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "teacher", "teacher", vocab=160)
    tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    write_tokenizer(tmp_path / "teacher", 160)
    write_tokenizer(tmp_path / "student", 120, bos=False)
    write_seeds(tmp_path / "data.jsonl", count=6)
    options = {"map": "procrustes", "attribution_examples": EXAMPLES}
    made = write(tmp_path, tmp_path / "out", **options)
    task, held = prepared(tmp_path, **options), Targets(tmp_path / "out" / FOLDER)
    dense = [Dense("llama", tmp_path / name) for name in ("teacher", "student")]
    aligned = task.aligned
    assert aligned is not None
    fitted = [n for n, text in enumerate(aligned.text_of) if text is not None and text < EXAMPLES]
    theirs = torch.cat([
        dense[0].activation(aligned.texts.samples[t].tokens, "hidden", 2)[list(at)].double()
        for t, at in enumerate(aligned.positions[:EXAMPLES])
    ])  # fmt: skip
    ours = []
    for number in fitted:
        sample = task.samples.samples[number]
        answers = [at for at, counts in enumerate(sample.loss_mask) if counts]
        at = [answers[token] - 1 for token in aligned.tokens[number]]
        ours.append(dense[1].activation(sample.tokens, "hidden", 2)[at].double())
    wanted = theirs @ dense_procrustes(theirs, torch.cat(ours)).T
    found = torch.cat([held.states(number, 2) for number in fitted]).double()
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    assert made.manifest["fitted"]["positions"] == len(theirs)


def test_inspect_attributes_nothing(pair: Any) -> None:
    from pkt.api import prepare_quality

    folder = pair[0]
    with pytest.raises(UsageError, match="--map flex: expected some of cosine, dual, ridge"):
        prepare_quality(str(folder / "teacher"), str(folder / "student"), maps=["flex"])
