"""KL and equal arg-maxima against whole logits of one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import tiny
from pkt.errors import IncompatibleError
from pkt.evaluation import agreement, logits, mean_agreement
from pkt.records import Sample

TOKENS = 90  # of the tokenizer; the models have more rows, and not equally many


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pair")
    tiny.build("gemma2", folder / "teacher", "teacher", vocab=96)
    tiny.build("llama", folder / "student", "student", vocab=104, seed=1)
    return tuple(
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )


def _samples(count: int = 6) -> list[Sample]:
    seeds = tiny.random_seeds(TOKENS, count, (3, 30))
    return [Sample(f"t:{i}", tuple(t), tuple(m)) for i, (t, m) in enumerate(seeds)]


@torch.no_grad()
def _dense(student, teacher, sample: Sample) -> tuple[float, int]:
    ids = torch.tensor([sample.tokens])
    counted = torch.tensor(sample.loss_mask[1:])
    p, t = (m(input_ids=ids).logits[0, :-1, :TOKENS][counted].double() for m in (student, teacher))
    kl = F.kl_div(p.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)
    return float(kl), int((p.argmax(-1) == t.argmax(-1)).sum())


def test_each_sample_agrees_as_it_does_alone(models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 4 * TOKENS)
    found = agreement(*models, _samples(), rows=TOKENS, batch_tokens=64)
    for row, sample in zip(found, _samples(), strict=True):
        kl, same = _dense(*models, sample)
        assert (row.name, row.tokens, row.same_top) == (sample.name, sample.loss_tokens, same)
        assert row.kl_sum == pytest.approx(kl, rel=1e-5)
    mean = mean_agreement(found)
    tokens = sum(row.tokens for row in found)
    assert mean.kl == pytest.approx(sum(row.kl_sum for row in found) / tokens)
    assert mean.top1 == pytest.approx(sum(row.same_top for row in found) / tokens)
    assert mean.kl > 0.1
    assert 0 <= mean.top1 < 1


def test_a_model_agrees_with_itself(models) -> None:
    mean = mean_agreement(agreement(models[0], models[0], _samples()))
    assert (mean.kl, mean.kl_error, mean.top1) == (0.0, 0.0, 1.0)


def test_the_direction_is_from_the_teacher(models) -> None:
    there = mean_agreement(agreement(*models, _samples(), rows=TOKENS)).kl
    back = mean_agreement(agreement(*reversed(models), _samples(), rows=TOKENS)).kl
    assert there != pytest.approx(back, rel=1e-3)


def test_padding_rows_do_not_count(models) -> None:
    student, teacher = models
    before = agreement(student, teacher, _samples(2), rows=TOKENS)
    with torch.no_grad():
        saved = student.lm_head.weight[TOKENS:].clone()
        student.lm_head.weight[TOKENS:] = 7.0
        after = agreement(student, teacher, _samples(2), rows=TOKENS)
        student.lm_head.weight[TOKENS:] = saved
    assert after == before


def test_a_token_beyond_both_vocabularies_is_refused(models) -> None:
    sample = Sample("t:0", (1, 95, 95), (False, True, True))
    with pytest.raises(IncompatibleError, match="token 95 is not among the 90 tokens"):
        agreement(*models, [sample], rows=TOKENS)
