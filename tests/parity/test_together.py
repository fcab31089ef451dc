"""Seeds of like length that share a layer's calls: what each gives a parameter stays its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
import runs
import tiny
from pkt.api import execute, prepare
from pkt.batches import batches
from pkt.errors import PktError
from pkt.methods.seeking import steps
from pkt.sweep import Sweep, layers
from pkt.sweep.layers import Batched
from test_extract import RANK, WORDS, build_pair, compare


class Watched(Sweep):
    """A sweep in which seeds share calls as the test says, and which tells how they did."""

    how: Batched = "always"
    seen: list[Sweep]

    def __init__(self, **parts: Any) -> None:
        super().__init__(**{**parts, "batched": self.how})
        self.inherited = self._apart | self._exact
        type(self).seen.append(self)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    class Fresh(Watched):
        seen: list[Sweep] = []  # noqa: RUF012

    monkeypatch.setattr(steps, "Sweep", Fresh)
    return Fresh


def seeds_alike(folder: Path) -> Path:
    """Six seeds of four lengths; most of them fill two batches, with padding."""
    rows = [{"text": " ".join(WORDS[at : at + 12 + at % 3])} for at in (0, 1, 2, 3, 4)]
    path = folder / "seeds.jsonl"
    rows.append({"text": "ink"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def extracted(
    folder: Path, teacher: Path, student: Path, out: str, notify: Any = lambda *told: None,
    **options: Any,
) -> Any:  # fmt: skip
    seeds = seeds_alike(folder)
    task = prepare(str(teacher), str(student), seeds, rank=RANK, **options)
    return task, execute(task, folder / out, notify=notify)


IN_CI = ("qwen2", "gemma3", "gpt_neox")  # biases; norms of heads; LayerNorm, fused projections


@pytest.mark.parametrize(
    "family",
    [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow)
     for name in tiny.FAMILIES],
)  # fmt: skip
def test_every_family_equals_full_autograd_of_each_seed(
    family: str, together: type[Watched], tmp_path: Path
) -> None:
    """Norms, biases and linear weights, in batches with padding."""
    teacher, student = build_pair(tmp_path, family, family)
    task, made = extracted(tmp_path, teacher, student, "out", dtype="float32")
    tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
    compare(made, reference.extract(teacher, student, tokens, RANK, "paper", "window", False))
    (sweep,) = together.seen
    assert max(len(numbers) for numbers in sweep._together) > 2
    assert len({len(task.seeds.samples[n].tokens) for n in sweep._together[-1]}) > 1
    assert not sweep._apart


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_batches_that_must_be_exact_change_no_byte(
    family: str, together: type[Watched], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whether they are kept or split up. (In bfloat16 a rounding may hide what one layer shows.)"""
    dtype = "float32"
    teacher, student = build_pair(tmp_path, family, family)
    for how in ("never", "exact"):
        together.how = how  # type: ignore[assignment]
        extracted(tmp_path, teacher, student, how, dtype=dtype)
    kept = runs.contents(tmp_path / "never")
    assert runs.contents(tmp_path / "exact") == kept
    apply = layers.LayerSteps._apply

    def off_in_batches(self: Any, index: int, weights: Any, hidden: Any, *rest: Any) -> Any:
        """As a kernel that sums in another order where there are more rows."""
        found = apply(self, index, weights, hidden, *rest)
        return found * (1 + 2.0**-7) if len(hidden) > 1 else found

    monkeypatch.setattr(layers.LayerSteps, "_apply", off_in_batches)
    extracted(tmp_path, teacher, student, "off", dtype=dtype)
    assert together.seen[-1]._apart
    assert runs.contents(tmp_path / "off") == kept
    together.how = "always"
    extracted(tmp_path, teacher, student, "always", dtype=dtype)
    assert runs.contents(tmp_path / "always") != kept  # the law can fail


def test_what_was_tried_outlives_the_process(together: type[Watched], tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    together.how = "exact"

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("backward", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path, teacher, student, "out", stop, dtype="float32")
    extracted(tmp_path, teacher, student, "out", dtype="float32")
    first, second = together.seen
    tried = first._apart | first._exact
    assert {way for way, *_ in tried} == {"forward", "backward"}
    assert not first.inherited
    assert second.inherited == tried == second._apart | second._exact


def test_a_module_that_is_no_map_of_one_tensor_has_its_seeds_apart(
    together: type[Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    teacher, student = build_pair(tmp_path, "llama", "llama")
    together.how = "never"
    extracted(tmp_path, teacher, student, "never", dtype="float32")
    norm = LlamaRMSNorm.forward

    def twice(self: Any, hidden: torch.Tensor) -> Any:
        return norm(self, hidden), None

    def call(self: Any, *args: Any) -> Any:
        found = torch.nn.Module.__call__(self, *args)
        return found[0] if isinstance(found, tuple) else found

    monkeypatch.setattr(LlamaRMSNorm, "forward", twice)
    monkeypatch.setattr(LlamaRMSNorm, "__call__", call)
    together.how = "exact"
    extracted(tmp_path, teacher, student, "exact", dtype="float32")
    assert together.seen[-1]._apart
    assert runs.contents(tmp_path / "exact") == runs.contents(tmp_path / "never")


def test_a_seed_that_is_not_finite_is_named_in_a_batch_too(
    together: type[Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    task = prepare(str(teacher), str(student), seeds_alike(tmp_path), dtype="float32")
    lengths = [len(sample.tokens) for sample in task.seeds.samples]
    batch = next(b for b in batches(lengths) if len({lengths[n] for n in b}) > 1)
    bad = next(n for n in batch if lengths.count(lengths[n]) == 1)
    linear = steps.LayerScores.linear

    def score(self: Any, module: str, weight: Any, xs: Any, dys: Any) -> Any:
        found = linear(self, module, weight, xs, dys)
        return [finite and len(x) != lengths[bad] for finite, x in zip(found, xs, strict=True)]

    monkeypatch.setattr(steps.LayerScores, "linear", score)
    with pytest.raises(PktError, match=rf"seed \S+:{bad + 1}: its gradient in layer 3 is not"):
        extracted(tmp_path, teacher, student, "out", dtype="float32")
