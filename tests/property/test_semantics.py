"""Laws of the maps, on heads drawn at random, against pseudo-inverses in float64."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt.checkpoint import Piece
from pkt.errors import CheckpointError, IncompatibleError
from pkt.semantics import (
    MAPS,
    Bases,
    Evidence,
    FinalNorm,
    HeadPair,
    Rows,
    final_norm,
    no_norm,
    treated,
)

HEAD_MAPS = ("cosine", "dual")
close = {"rtol": 1e-9, "atol": 1e-9}


def rows(weight: torch.Tensor, norm: FinalNorm | None = None) -> Rows:
    """A head that lies in memory, read as one in a file is."""
    step = weight.shape[1] * 8

    def read(pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        return {n: weight[p.begin // step : p.end // step] for n, p in pieces.items()}

    piece = Piece("lm_head.weight", 0, "F64", tuple(weight.shape), 0, weight.numel() * 8)
    return Rows(piece, "model.safetensors", read, norm or no_norm(weight.shape[1]))


def bases(teacher: torch.Tensor, student: torch.Tensor, ids: torch.Tensor | None = None) -> Bases:
    if ids is None:
        ids = torch.arange(len(teacher))[:, None].expand(-1, 2)
    return Bases(HeadPair(rows(teacher), rows(student), ids))


def made(name: str, of: Bases) -> torch.Tensor:
    return MAPS[name].make(Evidence((0, 0), of))


def drawn(seed: int, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]


def by_pinv(name: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The formulas as they are written, with dense pseudo-inverses and every basis vector."""
    s_t, s_s = (torch.from_numpy(np.linalg.pinv(w.numpy())) for w in (teacher, student))
    if name == "dual":
        return s_s @ teacher
    return (s_s / s_s.norm(dim=0)) @ (s_t / s_t.norm(dim=0)).T


sizes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 30), st.integers(0, 2**20))


@pytest.mark.parametrize("name", HEAD_MAPS)
@given(sizes, st.integers(1, 70), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_normal_equations_are_the_pseudo_inverse(
    name: str, size: tuple[int, int, int, int], chunk: int, block: int
) -> None:
    wide, narrow, more, seed = size
    count = max(wide, narrow) + 8 + more
    teacher, student = drawn(seed, (count, wide), (count, narrow))
    with (
        mock.patch("pkt.semantics.rows.CHUNK_ELEMENTS", chunk),
        mock.patch("pkt.semantics.bases.BLOCK", block),
    ):
        found = made(name, bases(teacher, student))
    torch.testing.assert_close(found, by_pinv(name, teacher, student), **close)


@given(sizes)
@settings(max_examples=40, deadline=None)
def test_of_a_model_with_itself_dual_is_the_identity_and_cosine_is_not(
    size: tuple[int, int, int, int],
) -> None:
    width, _, more, seed = size
    (head,) = drawn(seed, (width + 8 + more, width))
    head = head * torch.linspace(0.2, 3, len(head), dtype=torch.float64)[:, None]
    both = bases(head, head)
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(made("dual", both), identity, **close)
    cosine = made("cosine", both)
    nearest = cosine.trace() / width * identity  # a map's scale means nothing
    assert float((cosine - nearest).abs().max()) > 1e-4
    assert both.recomposed.teacher_self < 1
    assert both.recomposed.teacher_self == pytest.approx(both.recomposed.student_self, abs=0.2)


@pytest.mark.parametrize("name", HEAD_MAPS)
@given(sizes, st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_a_scale_of_a_head_or_of_a_state_changes_no_direction(
    name: str, size: tuple[int, int, int, int], scale: float
) -> None:
    wide, narrow, more, seed = size
    count = max(wide, narrow) + 8 + more
    teacher, student, states = drawn(seed, (count, wide), (count, narrow), (5, wide))
    plain = states @ made(name, bases(teacher, student)).T
    scaled = (scale * states) @ made(name, bases(scale * teacher, student)).T
    cosines = torch.cosine_similarity(plain, scaled)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), **close)


@pytest.mark.parametrize("name", HEAD_MAPS)
@given(sizes)
@settings(max_examples=30, deadline=None)
def test_an_orthogonal_change_of_basis_commutes(name: str, size: tuple[int, int, int, int]) -> None:
    """h → Qh, W → WQᵀ: M → Q_S M Q_Tᵀ."""
    wide, narrow, more, seed = size
    count = max(wide, narrow) + 8 + more
    teacher, student, a, b = drawn(
        seed, (count, wide), (count, narrow), (wide, wide), (narrow, narrow)
    )
    q_t, q_s = torch.linalg.qr(a)[0], torch.linalg.qr(b)[0]
    turned = made(name, bases(teacher @ q_t.T, student @ q_s.T))
    expected = q_s @ made(name, bases(teacher, student)) @ q_t.T
    torch.testing.assert_close(turned, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", HEAD_MAPS)
@given(sizes)
@settings(max_examples=30, deadline=None)
def test_permuting_both_vocabularies_changes_nothing_and_one_breaks_it(
    name: str, size: tuple[int, int, int, int]
) -> None:
    wide, narrow, more, seed = size
    count = max(wide, narrow) + 8 + more
    teacher, student = drawn(seed, (count, wide), (count, narrow))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    both = torch.stack([order, order], 1)
    plain = made(name, bases(teacher, student))
    torch.testing.assert_close(made(name, bases(teacher, student, both)), plain, **close)
    torch.testing.assert_close(made(name, bases(teacher[order], student[order])), plain, **close)
    if not torch.equal(order, torch.arange(count)):
        assert not torch.allclose(made(name, bases(teacher[order], student)), plain, atol=1e-6)
        undone = torch.stack([order.argsort(), torch.arange(count)], 1)
        again = made(name, bases(teacher[order], student, undone))
        torch.testing.assert_close(again, plain, **close)


@given(st.integers(0, 2**20), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_zero_rows_of_either_model_are_left_out_of_both(seed: int, count: int) -> None:
    teacher, student = drawn(seed, (30, 6), (30, 4))
    dead = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[: 2 * count]
    teacher[dead[:count]] = 0
    student[dead[count:]] = 0
    live = torch.ones(30, dtype=torch.bool).index_fill_(0, dead, value=False)
    found = bases(teacher, student)
    for name in HEAD_MAPS:
        expected = by_pinv(name, teacher[live], student[live])
        torch.testing.assert_close(made(name, found), expected, **close)
    assert (found.facts()["rows"], found.facts()["zero_rows"]) == (30 - 2 * count, 2 * count)


def test_a_singular_head_gets_a_ridge_and_says_so() -> None:
    teacher, student = drawn(3, (40, 6), (40, 5))
    student[:, 4] = student[:, 3]
    found = bases(teacher, student)
    about = found.facts()["student"]
    assert (about["rank"], about["condition"]) == (4, None)
    mean = float((student.T @ student).trace()) / 5
    assert about["ridge"] == pytest.approx(1e-8 * mean)
    assert found.facts()["teacher"]["ridge"] == 0
    gram = student.T @ student + 1e-8 * mean * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.inv(gram) @ student.T @ teacher
    torch.testing.assert_close(made("dual", found), expected, rtol=1e-5, atol=1e-7)
    # Where the head is not singular, the mapped logits are those of the pseudo-inverse.
    logits = student @ by_pinv("dual", teacher, student)
    torch.testing.assert_close(student @ made("dual", found), logits, rtol=1e-5, atol=1e-5)


def test_fewer_shared_tokens_than_channels_still_give_a_map() -> None:
    teacher, student = drawn(5, (10, 24), (10, 16))
    found = bases(teacher, student)
    assert (found.teacher.rank, found.student.rank) == (10, 10)
    for name in HEAD_MAPS:
        assert bool(made(name, found).isfinite().all())


@pytest.mark.parametrize(("condition", "ridged"), [(1e9, False), (1e11, True)])
def test_the_ridge_begins_at_the_stated_condition(condition: float, ridged: bool) -> None:
    values = torch.tensor([condition, 7.0, 1.0], dtype=torch.float64)
    turn = torch.linalg.qr(drawn(0, (3, 3))[0])[0]
    found = treated(turn @ torch.diag(values) @ turn.T)
    assert found.condition == pytest.approx(condition, rel=1e-3)
    assert (found.ridge > 0) == ridged


def test_heads_of_zeros_are_refused() -> None:
    zero = torch.zeros(9, 3, dtype=torch.float64)
    with pytest.raises(IncompatibleError, match="share no row that is not zero"):
        bases(zero, zero).facts()


def test_a_damaged_row_is_named() -> None:
    teacher, student = drawn(1, (20, 4), (20, 3))
    student[7, 2] = torch.nan
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' in model.safetensors.*\(7, 2\)"):
        bases(teacher, student).facts()


@given(st.integers(0, 2**20), st.integers(4, 40), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_probes_find_the_norm(seed: int, width: int, centred: bool, offset: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    gain, bias = torch.randn(2, width, generator=draw)
    if centred:
        norm: torch.nn.Module = torch.nn.LayerNorm(width)
        norm.load_state_dict({"weight": gain, "bias": bias * offset})
    else:
        norm = torch.nn.RMSNorm(width, eps=1e-5)
        norm.load_state_dict({"weight": gain})
    with torch.no_grad():
        found = final_norm(norm, width, "x")
    assert found.kind == ("LayerNorm" if centred else "RMSNorm")
    torch.testing.assert_close(found.gain.float(), gain, rtol=1e-5, atol=1e-5)
    (head,) = drawn(seed, (3, width))
    state = torch.randn(width, generator=draw)
    with torch.no_grad():
        given = norm(state).double() - (bias * offset * centred).double()
    folded = found.fold_(head.clone()) @ state.double()
    cosine = torch.cosine_similarity(folded, head @ given, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-4)


def test_what_is_no_norm_is_refused() -> None:
    for odd in (lambda h: h, lambda h: h / h.abs().amax(1, keepdim=True), lambda h: h * torch.nan):
        with pytest.raises(IncompatibleError, match="neither an RMSNorm nor a LayerNorm"):
            final_norm(odd, 8, "x")


@given(st.integers(0, 2**20), st.integers(2, 9), st.integers(2, 9))
@settings(max_examples=20, deadline=None)
def test_a_layer_norm_takes_one_direction_out_and_nothing_else(
    seed: int, wide: int, narrow: int
) -> None:
    """Rows centred: dual of a model with itself is the identity on states without a mean."""
    wide, narrow = wide + 4, narrow + 4
    teacher, student = drawn(seed, (40, wide), (40, narrow))
    norms = [FinalNorm("LayerNorm", torch.ones(n, dtype=torch.float64)) for n in (wide, narrow)]
    ids = torch.arange(40)[:, None].expand(-1, 2)
    found = Bases(HeadPair(rows(teacher, norms[0]), rows(student, norms[1]), ids))
    assert (found.teacher.rank, found.student.rank) == (wide - 1, narrow - 1)
    assert found.teacher.ridge == found.student.ridge == 0
    flat = [w - w.mean(1, keepdim=True) for w in (teacher, student)]
    for name in HEAD_MAPS:
        torch.testing.assert_close(made(name, found), by_pinv(name, *flat), rtol=1e-8, atol=1e-8)


@given(st.integers(0, 2**20), st.integers(3, 8), st.integers(3, 8), st.integers(4, 30))
@settings(max_examples=30, deadline=None)
def test_fitted_maps_against_their_definitions(
    seed: int, wide: int, narrow: int, count: int
) -> None:
    theirs, ours = drawn(seed, (count, wide), (count, narrow))
    given_ = Evidence((wide, narrow), states=(theirs, ours))
    ridge = 1e-2 * float(theirs.square().sum()) / wide
    gram = theirs.T @ theirs + ridge * torch.eye(wide, dtype=torch.float64)
    expected = ours.T @ theirs @ torch.linalg.inv(gram)
    torch.testing.assert_close(MAPS["ridge"].make(given_), expected, rtol=1e-7, atol=1e-9)
    found = MAPS["procrustes"].make(given_)
    singular = torch.linalg.svdvals(found)
    rank = min(count, wide, narrow)
    torch.testing.assert_close(singular[:rank], singular[0].expand(rank), rtol=1e-7, atol=1e-9)
    assert float(singular[rank:].sum()) == pytest.approx(0, abs=1e-7)
    nuclear = torch.linalg.svdvals(ours.T @ theirs).sum() / theirs.square().sum()
    assert float(singular[0]) == pytest.approx(float(nuclear), rel=1e-7)


def test_a_rotation_is_found_again() -> None:
    states, turn = drawn(2, (50, 6), (6, 6))
    turn = torch.linalg.qr(turn)[0]
    found = MAPS["procrustes"].make(Evidence((6, 6), states=(states, 3 * states @ turn.T)))
    torch.testing.assert_close(found, 3 * turn, **close)


def test_the_controls_are_what_they_say() -> None:
    sizes_ = Evidence((6, 4), seed=1)
    state = torch.arange(6.0, dtype=torch.float64)
    assert torch.equal(MAPS["truncate"].make(sizes_) @ state, state[:4])
    one, other = (MAPS["random"].make(Evidence((6, 4), seed=s)) for s in (1, 2))
    assert torch.equal(MAPS["random"].make(sizes_), one)
    assert not torch.equal(one, other)
    assert MAPS["truncate"].make(Evidence((4, 6))).shape == (6, 4)
