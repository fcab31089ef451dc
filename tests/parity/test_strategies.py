"""Every --select and --layers against scores of the reference: what was taken, and its sum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pkt
import reference
import runs
from pkt import _core
from pkt.records import Extraction
from pkt.selection import mix_seed
from test_extract import RANK, build_pair, compare, run_both, write_seeds

torch.set_num_threads(1)
RANDOM = ["random-window", "random-weights", "orthogonal"]
BIG = {"heads": 8, "kv_heads": 2, "hidden": 64}  # k and v are expanded: one part of each is a copy
SMALL = {"heads": 4, "kv_heads": 4, "hidden": 32}


class Bench:
    """One pair, the reference's scores of its teacher, and extractions from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher, self.student = build_pair(folder, "llama", "llama", big=BIG, small=SMALL)
        self.seeds = write_seeds(folder / "seeds.jsonl")
        task = pkt.api.prepare(str(self.teacher), str(self.student), self.seeds)
        tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
        self.model = reference.load(self.teacher)
        _, self.scores = reference.losses_and_scores(self.model, tokens)
        self.made: dict[str, Extraction] = {}

    def extract(self, **options: Any) -> Extraction:
        name = "-".join(f"{key}={value}" for key, value in sorted(options.items()))
        if name not in self.made:
            out, options = self.folder / name, {"rank": RANK, "dtype": "float32", **options}
            made = pkt.extract(str(self.teacher), str(self.student), self.seeds, out, **options)
            self.made[name] = made
        return self.made[name]

    def logical(self, window: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and scores of the logical teacher matrix behind a window."""
        source = f"{window['teacher']}.weight"
        weight, score = self.model.get_parameter(source).detach(), self.scores[source]
        if (repeat := window["kv_repeat"]) > 1:
            weight = reference.expand_kv(weight, 8, repeat, share=False)
            score = reference.expand_kv(score, 8, repeat, share=True)
        return weight, score

    def shape(self, name: str) -> tuple[int, int]:
        return tuple(load_file(self.student / "model.safetensors")[f"{name}.weight"].shape)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("strategies"))


def product(made: Extraction, name: str) -> torch.Tensor:
    tensors = load_file(made.folder / "adapter_model.safetensors")
    a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
    return tensors[f"base_model.model.{name}.lora_B.weight"].double() @ a


def sha256_of(indices: Any) -> str:
    return hashlib.sha256(np.asarray(indices, dtype="<u8").tobytes()).hexdigest()


def set_bits(mask: bytes) -> list[int]:
    """Flat indices of a bit mask, least significant bit first, one bit at a time."""
    return [8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("select", ["rows-cols", "top-weights"])
def test_rows_columns_and_weights_equal_full_autograd(
    select: str, family: str, tmp_path: Path
) -> None:
    teacher, student = build_pair(tmp_path, family, family)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", select=select)
    compare(made, wanted)
    modules = wanted["modules"]
    for key, window in made.manifest["windows"].items():
        name, _, part = key.partition("#")
        picks = modules[name]["parts"]
        (pick,) = [p for n, p in picks.items() if not part or n.endswith(f".{part}_proj")]
        if select == "rows-cols":
            assert window["rows"] == pick.at[0].tolist()
            assert window["cols"] == pick.at[1].tolist()
        else:
            assert window["sha256"] == sha256_of(pick.at)


@pytest.mark.parametrize("select", RANDOM)
def test_random_choices_repeat_with_their_seed_and_differ_without(
    select: str, bench: Bench
) -> None:
    first, other = bench.extract(select=select, seed=0), bench.extract(select=select, seed=1)
    folder = bench.folder / f"{select} again"
    again = pkt.extract(
        str(bench.teacher), str(bench.student), bench.seeds, folder,
        rank=RANK, dtype="float32", select=select, seed=0,
    )  # fmt: skip
    assert runs.contents(first.folder) == runs.contents(again.folder)
    names = list(first.manifest["windows"])
    same = [
        name for name in names
        if torch.allclose(product(first, name), product(other, name), rtol=1e-3, atol=1e-5)
    ]  # fmt: skip
    assert len(same) < len(names) / 4  # a random window may fall on the same place
    assert first.manifest["layers"] == other.manifest["layers"]


def test_matrices_of_one_run_get_places_of_their_own(bench: Bench) -> None:
    windows = bench.extract(select="random-window", seed=0).manifest["windows"]
    places = {
        (window["rows"][0], window["cols"][0])
        for name, window in windows.items() if name.endswith(("gate_proj", "up_proj"))
    }  # fmt: skip
    assert len(places) == 6


@pytest.mark.parametrize("seed", [0, 1])
def test_random_windows_lie_inside_and_hold_their_sum(seed: int, bench: Bench) -> None:
    made = bench.extract(select="random-window", seed=seed)
    for name, window in made.manifest["windows"].items():
        weight, score = bench.logical(window)
        (top, bottom), (left, right) = window["rows"], window["cols"]
        assert (bottom - top, right - left) == bench.shape(name)
        assert 0 <= top < bottom <= weight.shape[0]
        assert 0 <= left < right <= weight.shape[1]
        total = float(score[top:bottom, left:right].sum())
        assert window["score"] == pytest.approx(total, rel=1e-4)
        best = reference.factors(weight[top:bottom, left:right], RANK)
        torch.testing.assert_close(product(made, name), best.b @ best.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("select", ["random-weights", "top-weights"])
def test_single_weights_are_the_hashed_ones_in_row_major_order(select: str, bench: Bench) -> None:
    made = bench.extract(select=select, seed=1)
    for name, window in made.manifest["windows"].items():
        weight, score = bench.logical(window)
        shape = bench.shape(name)
        count = shape[0] * shape[1]
        if select == "random-weights":
            seed = mix_seed(1, window["teacher"])
            indices = set_bits(_core.random_weights(weight.numel(), count, seed))
        else:
            indices = reference.top_weights(score, *shape).tolist()
        assert len(indices) == count
        assert window["sha256"] == sha256_of(indices), name
        assert window["score"] == pytest.approx(float(score.flatten()[indices].sum()), rel=1e-4)
        best = reference.factors(weight.flatten()[indices].reshape(shape), RANK)
        torch.testing.assert_close(product(made, name), best.b @ best.a, rtol=1e-3, atol=1e-5)
        assert "rows" not in window


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_orthogonal_keeps_size_and_nothing_else(split: str, bench: Bench) -> None:
    """The singular values of the window, on orthonormal factors that are not its own."""
    window = bench.extract(select="window", seed=0)
    made = bench.extract(select="orthogonal", seed=0, split=split)
    assert made.manifest["windows"] == window.manifest["windows"]
    tensors = load_file(made.folder / "adapter_model.safetensors")
    for name in made.manifest["windows"]:
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        sigma = torch.linalg.svdvals(product(window, name))[:RANK]
        torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:RANK], sigma, rtol=1e-4, atol=1e-6)
        eye = torch.eye(RANK, dtype=torch.float64)
        if split == "paper":
            torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-5)
            torch.testing.assert_close(b.T @ b, torch.diag(sigma**2), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(a @ a.T, torch.diag(sigma), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(b.T @ b, torch.diag(sigma), rtol=1e-4, atol=1e-4)
        cosine = (product(made, name) * product(window, name)).sum() / (sigma**2).sum()
        assert abs(float(cosine)) < 0.7


def test_layer_rules(bench: Bench) -> None:
    """Three of four, in order; windows and scores are those of the layers named."""
    scores = bench.extract(select="window", seed=0).manifest["layer_scores"]
    ranked = sorted(sorted(range(4), key=lambda i: (-scores[i], i))[:3])
    expected = {"sensitivity": ranked, "first": [0, 1, 2], "last": [1, 2, 3]}
    whole = {}
    for rule, layers in expected.items():
        made = bench.extract(select="window", seed=0, layers=rule)
        assert made.manifest["layers"] == layers, rule
        for name, window in made.manifest["windows"].items():
            parts = name.split(".")
            parts[2] = str(layers[int(parts[2])])
            assert window["teacher"] == ".".join(parts)
            assert whole.setdefault(window["teacher"], window) == window
    assert ranked != [0, 1, 2], "the quiet layer must be left out for this to be a test"


def test_random_layers_keep_their_order_and_follow_the_seed(bench: Bench) -> None:
    found = [
        bench.extract(select="window", seed=seed, layers="random").manifest["layers"]
        for seed in range(4)
    ]
    for layers in found:
        assert layers == sorted(set(layers))
        assert len(layers) == 3
        assert set(layers) <= set(range(4))
    assert len({tuple(layers) for layers in found}) > 1


def test_options_stand_in_the_manifest(bench: Bench) -> None:
    made = bench.extract(select="rows-cols", seed=3, layers="last", split="balanced")
    options = json.loads((made.folder / "pkt_manifest.json").read_text())["options"]
    assert options == {
        "rank": RANK, "layers": "last", "select": "rows-cols", "split": "balanced",
        "targets": None, "embeddings": False, "dtype": "F32", "seed": 3, "template": "paper",
        "max_tokens": 2048, "limit": 32,
    }  # fmt: skip
