"""Mapped activations and attribution against whole models in memory, hooks and autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import pkt
import tiny
from pkt.api import prepare_targets
from pkt.records import LayerPair, Recording
from pkt.targets import FOLDER, Targets
from test_alignment import dense_head, dense_map
from test_extract import write_seeds
from tiny_tokenizer import write_tokenizer

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen2", "gemma3", "gpt_neox"]
#: The modules whose outputs a layer adds to the residual stream, as each family's code has it.
ADDS = {
    "llama": ("self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("attention", "mlp"),
}
LAYERS = (4, 3)  # of teacher and student
OPTIONS: dict[str, Any] = {"dtype": "float32", "states_dtype": "float32", "states": True}


class Dense:
    """A teacher in memory, and what flows through its layers for each example."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        core = self.model.gpt_neox if hasattr(self.model, "gpt_neox") else self.model.model
        self.layers = core.layers

    def run(self, tokens: tuple[int, ...]) -> tuple[dict[tuple[str, int], torch.Tensor], Any]:
        """Activations (1, n, D) by kind and layer from 1, boundary 0 too, and logits (n, V)."""
        seen: dict[tuple[str, int], torch.Tensor] = {}
        handles = []

        def note(kind: str, number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                first.retain_grad()
                seen[kind, number] = first
                if kind == "hidden" and number == 1:
                    seen["hidden", 0] = args[0]

            return hook

        for number, layer in enumerate(self.layers, 1):
            for kind, name in zip(("attn", "mlp"), ADDS[self.family], strict=True):
                module = layer.get_submodule(name)
                handles.append(module.register_forward_hook(note(kind, number)))
            handles.append(layer.register_forward_hook(note("hidden", number)))
        logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return seen, logits

    def activation(self, tokens: tuple[int, ...], kind: str, layer: int) -> torch.Tensor:
        seen, _ = self.run(tokens)
        if kind == "block":
            return (seen["hidden", layer] - seen["hidden", layer - 1])[0].detach()
        return seen[kind, layer][0].detach()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    for seed, size in enumerate(("teacher", "student")):
        tiny.build(request.param, folder / size, size, vocab=128, seed=seed)
        tiny.write_tokenizer(folder / size, 128)
    write_seeds(folder / "data.jsonl")
    return request.param, folder, Dense(request.param, folder / "teacher")


def write(folder: Path, out: Path, **options: Any) -> Recording:
    paths = [options.pop(name, folder / name) for name in ("teacher", "student", "data.jsonl")]
    return pkt.write_targets(*map(str, paths), out, **{**OPTIONS, **options})


def prepared(folder: Path, **options: Any) -> Any:
    paths = (str(folder / name) for name in ("teacher", "student", "data.jsonl"))
    return prepare_targets(*paths, **{**OPTIONS, **options})


def matrix(folder: Path, task: Any) -> torch.Tensor:
    """W_S⁺ W_T in float64, by the pseudo-inverse of whole heads."""
    heads = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("teacher", "student")
    ]
    rows = [pair[0] for pair in task.shared.pairs]
    both = [dense_head(model, 128, fold=True)[rows] for model in heads]
    return dense_map("dual", *both)


def wanted_states(dense: Dense, sample: Any, terms: dict[tuple[str, int], float]) -> torch.Tensor:
    """Σ factor · activation at the positions before the answer tokens, float64."""
    at = [i - 1 for i, counts in enumerate(sample.loss_mask) if counts]
    total = torch.zeros(len(at), dense.model.config.hidden_size, dtype=torch.float64)
    for (kind, layer), factor in terms.items():
        if (kind, layer) == ("hidden", 0):
            found = dense.run(sample.tokens)[0]["hidden", 0][0].detach()
        else:
            found = dense.activation(sample.tokens, kind, layer)
        total += factor * found[at].double()
    return total


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within 1e-5 of the rows' size."""
    assert found.shape == wanted.shape
    return bool((found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("interface", ["mlp", "attn", "block", "hidden"])
def test_states_against_hooks(interface: str, pair: Any, tmp_path: Path) -> None:
    _, folder, dense = pair
    made = write(folder, tmp_path / "out", interface=interface)
    task, held = prepared(folder, interface=interface), Targets(tmp_path / "out" / FOLDER)
    assert held.pairs == (LayerPair(1, 1), LayerPair(2, 2), LayerPair(4, 3))
    assert (held.interface, held.map) == (interface, "dual")
    carried = matrix(folder, task)
    for number, sample in enumerate(task.samples.samples):
        assert held.aligned(number).tolist() == list(range(sample.loss_tokens))
        for layers in held.pairs:
            terms = {(interface, layers.teacher): 1.0}
            wanted = wanted_states(dense, sample, terms) @ carried.T
            assert near(held.states(number, layers.student), wanted)
    assert made.manifest["rounding"] == 0
    assert made.manifest["rows"] == task.samples.loss_tokens


def test_spans_and_mixtures(pair: Any, tmp_path: Path) -> None:
    """A span begins where the pair below ends; a mixed state is mixed before it is mapped."""
    _, folder, dense = pair
    cases: list[tuple[dict[str, Any], dict[int, dict[tuple[str, int], float]]]] = [
        (
            {"interface": "span", "map": "truncate"},
            {
                1: {("hidden", 1): 1, ("hidden", 0): -1},
                2: {("hidden", 2): 1, ("hidden", 1): -1},
                3: {("hidden", 4): 1, ("hidden", 2): -1},
            },
        ),
        (
            {"interface": "hidden", "map": "truncate", "interpolate": True},
            {  # u = 4/3, 8/3, 4
                1: {("hidden", 1): 2 / 3, ("hidden", 2): 1 / 3},
                2: {("hidden", 2): 1 / 3, ("hidden", 3): 2 / 3},
                3: {("hidden", 4): 1},
            },
        ),
        (
            {"interface": "mlp", "map": "truncate", "interpolate": True},
            {
                1: {("mlp", 1): 2 / 3, ("mlp", 2): 1 / 3},
                2: {("mlp", 2): 1 / 3, ("mlp", 3): 2 / 3},
                3: {("mlp", 4): 1},
            },
        ),
        (
            {"interface": "block", "map": "truncate", "pairs": "3:1,4:2"},
            {1: {("block", 3): 1}, 2: {("block", 4): 1}},
        ),
    ]
    for index, (options, terms) in enumerate(cases):
        out = tmp_path / f"{index}"
        write(folder, out, **options)
        task, held = prepared(folder, **options), Targets(out / FOLDER)
        carried = load_file(out / "maps" / "truncate.safetensors")["map"]
        assert torch.equal(carried, torch.eye(32, 48))
        assert [layers.student for layers in held.pairs] == list(terms)
        for number, sample in enumerate(task.samples.samples):
            for student, sums in terms.items():
                wanted = wanted_states(dense, sample, sums)[:, :32]
                assert near(held.states(number, student), wanted), (options, student)


def dense_attribution(
    dense: Dense, samples: Any, kind: str
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Of each sample: |Σ a ⊙ ∂L/∂a| and Σ|a ⊙ ∂L/∂a| by layer, and L."""
    sums, masses, losses = [], [], []
    for sample in samples:
        seen, logits = dense.run(sample.tokens)
        at = torch.tensor(sample.loss_mask).nonzero()[:, 0]
        loss = functional.cross_entropy(logits[at - 1], torch.tensor(sample.tokens)[at])
        loss.backward()
        losses.append(float(loss.detach()))
        products = []
        for layer in range(1, LAYERS[0] + 1):
            if kind == "block":
                added = seen["hidden", layer] - seen["hidden", layer - 1]
                gradient = seen["hidden", layer].grad
            else:
                added = seen[kind, layer]
                gradient = added.grad
            products.append(added.detach().double() * gradient.double())
        masses.append([float(product.abs().sum()) for product in products])
        sums.append([abs(float(product.sum())) for product in products])
    return sums, masses, losses


@pytest.mark.parametrize("interface", ["mlp", "attn", "hidden"])  # of others as of hidden
@pytest.mark.parametrize("variant", ["signed", "abs"])
def test_attribution_against_autograd(
    interface: str, variant: str, pair: Any, tmp_path: Path
) -> None:
    """A of each layer, within 1e-5 of Σ|a ⊙ ∂L/∂a|: a signed sum may be near zero."""
    _, folder, dense = pair
    options = {
        "interface": interface, "map": "truncate", "critical": 2, "attribution": variant,
        "attribution_examples": 4,
    }  # fmt: skip
    made = write(folder, tmp_path / "out", **options)
    task = prepared(folder, **options)
    kind = interface if interface in ("mlp", "attn") else "block"
    sums, masses, losses = dense_attribution(dense, task.samples.samples[:4], kind)
    mass = torch.tensor(masses).mean(0)
    wanted = mass if variant == "abs" else torch.tensor(sums).mean(0)
    found = made.manifest["attribution"]
    assert found["examples"] == 4
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert bool(((torch.tensor(found["scores"]) - wanted).abs() <= 1e-5 * mass).all())
    if interface == "hidden":
        high = sorted(range(1, 5), key=lambda layer: -wanted[layer - 1])[:2]
        floor = {1: 1, 2: 2, 3: 3, 4: 3}  # the student layer whose ℓ_k reaches it
        assert {pair["student"] for pair in made.manifest["pairs"]} == {floor[n] for n in high}
        page = (tmp_path / "out" / "report" / "index.html").read_text()
        assert f"{found['scores'][high[0] - 1]:.4g}" in page
        assert (tmp_path / "out" / "report" / "attribution.png").stat().st_size > 5000


def test_an_attributed_layer_for_each_of_the_students(pair: Any, tmp_path: Path) -> None:
    _, folder, _ = pair
    made = write(folder, tmp_path / "out", interface="span", map="truncate", pair_by="attribution")
    scores = made.manifest["attribution"]["scores"]
    pairs = [(found["teacher"], found["student"]) for found in made.manifest["pairs"]]
    last = 3 if scores[2] >= scores[3] else 4
    assert pairs == [(1, 1), (2, 2), (last, 3)]


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_rounding_is_stated_and_bounded(name: str, bound: float, pair: Any, tmp_path: Path) -> None:
    _, folder, _ = pair
    write(folder, tmp_path / "exact")
    made = write(folder, tmp_path / "out", states_dtype=name)
    exact, held = (Targets(tmp_path / each / FOLDER) for each in ("exact", "out"))
    worst = 0.0
    for number in range(len(held.answers)):
        for layers in held.pairs:
            found = held.states(number, layers.student)
            assert found.dtype == getattr(torch, name)
            wanted = exact.states(number, layers.student).double()
            worst = max(worst, float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()))
    assert made.manifest["rounding"] == pytest.approx(worst, rel=1e-9)
    assert 0 < worst <= bound


def test_attention_that_slides_beside_one_that_does_not_is_mentioned(tmp_path: Path) -> None:
    tiny.build("gemma3", tmp_path / "teacher", "teacher", vocab=128)
    tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    for name in ("teacher", "student"):
        tiny.write_tokenizer(tmp_path / name, 128)
    write_seeds(tmp_path / "data.jsonl")
    made = write(tmp_path, tmp_path / "out", map="truncate")
    assert [found["unlike"] for found in made.manifest["pairs"]] == [True, False, False]


# Another tokenizer


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose tokenizer cuts the same text otherwise, and puts no BOS in front."""
    folder = tmp_path_factory.mktemp("apart")
    tiny.build("llama", folder / "teacher", "teacher", vocab=160)
    tiny.build("llama", folder / "student", "student", vocab=128, seed=1)
    write_tokenizer(folder / "teacher", 160)
    write_tokenizer(folder / "student", 120, bos=False)
    write_seeds(folder / "data.jsonl", count=6)
    return folder


def test_texts_of_two_tokenizers_meet_where_both_end_together(apart: Path, tmp_path: Path) -> None:
    made = write(apart, tmp_path / "out", map="truncate")
    held, task = Targets(tmp_path / "out" / FOLDER), prepared(apart, map="truncate")
    assert held.top_k == 0
    with pytest.raises(pkt.errors.IncompatibleError, match="no logits"):
        held.of(0)
    assert not list((tmp_path / "out" / FOLDER).glob("logits*"))
    dense = Dense("llama", apart / "teacher")
    big, small = (AutoTokenizer.from_pretrained(apart / n) for n in ("teacher", "student"))

    def text(tokenizer: Any, tokens: Any) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    rows = 0
    for number, sample in enumerate(task.samples.samples):
        whole = text(small, sample.tokens)
        theirs = big(whole).input_ids
        ends: dict[str, int] = {}
        for at in range(1, len(theirs)):
            ends.setdefault(text(big, theirs[: at + 1]), at)
        answers = [at for at, counts in enumerate(sample.loss_mask) if counts]
        before = [text(small, sample.tokens[:at]) for at in answers]
        meet = [index for index, words in enumerate(before) if words and words in ends]
        assert held.aligned(number).tolist() == meet
        rows += len(meet)
        for layers in held.pairs:
            states = dense.activation(tuple(theirs), "hidden", layers.teacher)
            wanted = states[[ends[before[index]] for index in meet]][:, :32].double()
            assert near(held.states(number, layers.student), wanted)
    assert 0 < rows < sum(held.answers)
    told = json.loads((tmp_path / "out" / "pkt_manifest.json").read_text())
    assert told["rows"] == rows
    assert told["coverage"]["answer_tokens"] == pytest.approx(rows / sum(held.answers))
    assert 0.5 < told["coverage"]["tokens"] <= 1
    assert "tail" not in made.manifest


def test_attribution_of_a_teacher_with_its_own_tokenizer(apart: Path, tmp_path: Path) -> None:
    made = write(apart, tmp_path / "out", critical=1, attribution_examples=3)
    assert len(made.manifest["attribution"]["scores"]) == 4
    held = Targets(tmp_path / "out" / FOLDER)
    assert len(held.pairs) == 1
    carried = load_file(tmp_path / "out" / "maps" / "dual.safetensors")["map"]
    assert carried.shape == (32, 48)
    assert made.manifest["heads"]["rows"] == len(prepared(apart).shared.pairs)


def written_pair(folder: Path, family: str, **options: Any) -> PreTrainedModel:
    """A pair of a teacher of this family and a llama, with data; the teacher's model."""
    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=48, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=80, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **options,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny.randomize(model, 0)
    model.save_pretrained(folder / "teacher")
    tiny.build("llama", folder / "student", "student", vocab=128, seed=1)
    for name in ("teacher", "student"):
        tiny.write_tokenizer(folder / name, 128)
    write_seeds(folder / "data.jsonl")
    return model.eval()


@pytest.mark.parametrize("interface", ["mlp", "attn"])
def test_what_granite_adds_is_its_modules_outputs_times_its_factor(
    interface: str, tmp_path: Path
) -> None:
    written_pair(tmp_path, "granite", residual_multiplier=0.4)
    dense = Dense("llama", tmp_path / "teacher")  # whose modules have the names of Granite's
    out = tmp_path / "out"
    made = write(tmp_path, out, map="truncate", interface=interface, critical=2)
    samples, held = prepared(tmp_path, map="truncate").samples.samples, Targets(out / FOLDER)
    for number, sample in enumerate(samples):
        for pair in held.pairs:
            wanted = wanted_states(dense, sample, {(interface, pair.teacher): 0.4})[:, :32]
            assert near(held.states(number, pair.student), wanted)
    sums, masses, _ = dense_attribution(dense, samples, interface)
    found, wanted = (torch.tensor(each) for each in (made.manifest["attribution"]["scores"], sums))
    error = (found - wanted.mean(0)).abs()
    assert bool((error <= 1e-5 * torch.tensor(masses).mean(0)).all())


def test_a_layer_whose_modules_are_not_what_it_adds_is_refused_by_sub_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims a factor that it does not apply."""
    written_pair(tmp_path, "llama")
    monkeypatch.setattr(LlamaDecoderLayer, "residual_multiplier", 2.0, raising=False)
    for options in ({"interface": "mlp"}, {"interface": "attn", "critical": 1}):
        with pytest.raises(
            pkt.errors.IncompatibleError, match=r"layer . add to the hidden"
        ) as error:
            write(tmp_path, tmp_path / "out", map="truncate", **options)
        assert "--interface block or hidden" in str(error.value.hint)
        assert not (tmp_path / "out").exists()
    write(tmp_path, tmp_path / "out", map="truncate", interface="block")
