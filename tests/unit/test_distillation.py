"""The divergence of k + 1 bins against a dense float64 reference, and what an objective counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt.records import TopLogits
from pkt.targets import top_logits
from pkt.training import Distillation, Said, Totals
from pkt.training.batches import Collate
from pkt.training.loop import _Trainer


def reference(
    student: torch.Tensor, teacher: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ KL over k + 1 bins and its gradient, from whole distributions in float64."""
    leaf = student.double().requires_grad_()
    p, q = teacher.double().softmax(-1), leaf.softmax(-1)
    order = teacher.double().argsort(dim=-1, descending=True, stable=True)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(p)):
        inside, outside = order[row, :k], order[row, k:]
        total = total + (p[row, inside] * (p[row, inside] / q[row, inside]).log()).sum()
        if len(outside) and float(p[row, outside].sum()):
            a, b = p[row, outside].sum(), q[row, outside].sum()
            total = total + a * (a / b).log()
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient


def objective(teacher: torch.Tensor, k: int, **options: float) -> Distillation:
    """Whose only example has a row of ``teacher`` for each answer token."""
    rows = top_logits(teacher, k, teacher.shape[1])
    return Distillation(lambda example: rows, teacher.shape[1], **options)


def drawn(seed: int, rows: int, vocabulary: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        scale * torch.randn(rows, vocabulary, generator=draw),
        scale * torch.randn(rows, vocabulary, generator=draw),
    )


def found(
    target: Distillation, student: torch.Tensor, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    said = torch.zeros(len(student), dtype=torch.long) if tokens is None else tokens
    loss = target.loss(Said(leaf, said, target.columns([0]), [0], Totals(1)))["output"]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 30),
    st.sampled_from([0.1, 1.0, 4.0]), st.data(),
)  # fmt: skip
def test_loss_and_gradient_against_dense_float64(
    seed: int, rows: int, vocabulary: int, scale: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocabulary))
    student, teacher = drawn(seed, rows, vocabulary, scale)
    loss, gradient = found(objective(teacher, k), student)
    wanted, slope = reference(student, teacher, k)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
    assert float((gradient - slope).norm()) <= 1e-5 * float(slope.norm()) + 1e-6
    whole = float(reference(student, teacher, vocabulary)[0])
    assert -1e-6 <= float(loss) <= whole + 1e-5 * (1 + whole)  # fewer bins never say more


def test_a_small_tail_keeps_its_gradient() -> None:
    """q_tail is summed over its tokens: 1 − Σ q_i in float32 would be zero here."""
    teacher = torch.tensor([[0.0, -1.0, -3.0, -3.0]])
    student = torch.tensor([[20.0, 19.0, 0.0, 0.0]])
    loss, gradient = found(objective(teacher, 2), student)
    wanted, slope = reference(student, teacher, 2)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert torch.allclose(gradient.double(), slope, rtol=1e-5, atol=1e-8)
    assert float(gradient[0, 2]) < -0.02


def test_nothing_is_left_to_learn_from_oneself() -> None:
    student, _ = drawn(0, 5, 20, 2.0)
    for k in (1, 7, 20):
        loss, gradient = found(objective(student, k), student)
        assert abs(float(loss)) < 1e-5
        assert float(gradient.abs().max()) < 1e-6


def test_an_impossible_tail_adds_nothing() -> None:
    teacher = torch.tensor([[200.0, 199.0, -200.0]])
    student = torch.tensor([[0.0, 1.0, 2.0]])
    loss, gradient = found(objective(teacher, 2), student)
    wanted, slope = reference(student, teacher, 2)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert torch.allclose(gradient.double(), slope, atol=1e-6)


def test_the_weight_mixes_with_the_labels() -> None:
    student, teacher = drawn(3, 6, 11, 1.5)
    tokens = torch.tensor([0, 10, 3, 3, 7, 1])
    kl, kl_slope = reference(student, teacher, 4)
    leaf = student.double().requires_grad_()
    labels = torch.nn.functional.cross_entropy(leaf, tokens, reduction="sum")
    (slope,) = torch.autograd.grad(labels, leaf)
    loss, gradient = found(objective(teacher, 4, weight=0.3), student, tokens)
    assert float(loss) == pytest.approx(0.3 * float(kl) + 0.7 * float(labels.detach()), rel=1e-5)
    assert torch.allclose(gradient.double(), 0.3 * kl_slope + 0.7 * slope, atol=1e-6)


def test_rows_that_pad_the_students_vocabulary_get_no_gradient_from_the_divergence() -> None:
    student, teacher = drawn(4, 3, 9, 1.0)
    padded = torch.cat([student, torch.full((3, 4), 50.0)], dim=1)
    loss, gradient = found(objective(teacher, 5), padded)
    assert float(loss) == pytest.approx(float(reference(student, teacher, 5)[0]), rel=1e-5)
    assert float(gradient[:, 9:].abs().max()) == 0


def test_rows_of_a_batch_follow_the_examples() -> None:
    teachers = [drawn(seed, rows, 8, 1.0)[0] for seed, rows in ((0, 2), (1, 3))]
    rows: list[TopLogits] = [top_logits(teacher, 3, 8) for teacher in teachers]
    columns = Distillation(rows.__getitem__, 8).columns([1, 0])
    assert torch.equal(columns["teacher_ids"], torch.cat([rows[1].ids, rows[0].ids]).long())
    logs = torch.cat([teachers[1], teachers[0]]).double().log_softmax(-1)
    wanted = logs.gather(-1, columns["teacher_ids"]).float()
    assert torch.allclose(columns["teacher_logs"][:, :3], wanted, rtol=1e-6)
    assert torch.allclose(columns["teacher_logs"].exp().sum(-1), torch.ones(5))


def test_prompt_and_padding_do_not_count() -> None:
    """The Trainer's own loss: logits elsewhere change nothing and get no gradient."""
    from types import SimpleNamespace

    from pkt.records import Sample

    samples = [
        Sample("a", (5, 6, 7, 1), (False, False, True, True)),
        Sample("b", (3, 2, 4, 5, 6, 1), (False, False, False, False, True, True)),
    ]
    teacher = [drawn(number, 2, 8, 2.0)[0] for number in range(2)]
    target = Distillation(lambda number: top_logits(teacher[number], 3, 8), 8)
    batch = Collate(target)(list(enumerate(samples)))
    trainer = _Trainer.__new__(_Trainer)
    trainer.learn(target)
    trainer._columns, trainer._totals = batch.pop("columns"), Totals(4)
    logits = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(9)).requires_grad_()
    loss = trainer.compute_loss_func(SimpleNamespace(logits=logits), batch["labels"], 4)
    loss.backward()
    at = [(0, 1), (0, 2), (1, 3), (1, 4)]  # where the answer tokens are predicted
    picked = torch.stack([logits[row, position] for row, position in at]).detach()
    wanted, slope = reference(picked, torch.cat(teacher), 3)
    assert float(loss.detach()) == pytest.approx(float(wanted) / 4, rel=1e-5)
    seen = torch.zeros(2, 6, 8, dtype=torch.float64)
    for (row, position), each in zip(at, slope / 4, strict=True):
        seen[row, position] = each
    assert torch.allclose(logits.grad.double(), seen, atol=1e-6)
    assert float(logits.grad[seen == 0].abs().max()) == 0
