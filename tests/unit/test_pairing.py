"""Layer pairing: the paper's own numbers, and laws for every depth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt.errors import IncompatibleError, UsageError
from pkt.pairing import (
    critical_pairs,
    floor_pairs,
    given_pairs,
    interpolated_pairs,
    unlike_attention,
)
from pkt.records import LayerPair

depths = st.integers(1, 40).flatmap(lambda s: st.tuples(st.integers(s, 120), st.just(s)))


def test_forty_layers_onto_thirty_two() -> None:
    teachers = [pair.teacher for pair in floor_pairs(40, 32)]
    assert teachers[:8] == [1, 2, 3, 5, 6, 7, 8, 10]
    assert teachers[-1] == 40


@given(depths)
@settings(deadline=None)
def test_the_floor_rule_keeps_order_and_ends_at_the_last_layer(depth: tuple[int, int]) -> None:
    pairs = floor_pairs(*depth)
    assert [pair.student for pair in pairs] == list(range(1, depth[1] + 1))
    teachers = [pair.teacher for pair in pairs]
    assert teachers == sorted(set(teachers)), "each teacher layer at most once"
    assert teachers[0] >= 1
    assert teachers[-1] == depth[0]


@given(depths, st.data())
@settings(deadline=None)
def test_a_critical_layer_leads_to_the_first_pair_at_or_above_it(
    depth: tuple[int, int], data: st.DataObject
) -> None:
    layer = data.draw(st.integers(1, depth[0]))
    (pair,) = critical_pairs([layer], *depth)
    every = floor_pairs(*depth)
    assert pair in every
    assert pair.teacher >= layer
    assert all(p.teacher < layer for p in every if p.student < pair.student)


def test_critical_layers_that_lead_to_one_pair_share_it() -> None:
    assert critical_pairs([4, 5, 1], 40, 32) == (LayerPair(1, 1), LayerPair(5, 4))
    assert critical_pairs([], 40, 32) == ()


@given(depths)
@settings(deadline=None)
def test_interpolation_hits_the_exact_place(depth: tuple[int, int]) -> None:
    """a + λ is k L_T / L_S, kept between 1 and L_T."""
    for pair in interpolated_pairs(*depth):
        assert 0 <= pair.mix <= 1
        assert 1 <= pair.teacher <= max(1, depth[0] - 1)
        exact = min(max(pair.student * depth[0] / depth[1], 1), depth[0])
        assert pair.teacher + pair.mix == pytest.approx(exact, abs=1e-12)


def test_interpolation_of_forty_onto_thirty_two() -> None:
    assert interpolated_pairs(40, 32)[:3] == (
        LayerPair(1, 1, 0.25), LayerPair(2, 2, 0.5), LayerPair(3, 3, 0.75),
    )  # fmt: skip
    assert interpolated_pairs(40, 32)[-1] == LayerPair(39, 32, 1.0)


def test_given_pairs_come_by_student_layer() -> None:
    assert given_pairs("5:3, 2:1", 6, 4) == (LayerPair(2, 1), LayerPair(5, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "TEACHER:STUDENT"),
        ("a:b", "TEACHER:STUDENT"),
        ("", "TEACHER:STUDENT"),
        ("-1:2", "TEACHER:STUDENT"),
        ("0:1", "teacher layer 0: expected 1 to 6"),
        ("7:1", "teacher layer 7: expected 1 to 6"),
        ("1:5", "student layer 5: expected 1 to 4"),
        ("1:2,3:2", "student layer 2 stands there twice"),
    ],
)
def test_given_pairs_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        given_pairs(text, 6, 4)


def test_a_shallower_teacher_is_refused() -> None:
    for rule in (floor_pairs, interpolated_pairs):
        with pytest.raises(IncompatibleError, match="at least the student's 4, found 3"):
            rule(3, 4)
    with pytest.raises(UsageError, match="teacher layer 9"):
        critical_pairs([9], 8, 4)


def test_sliding_beside_full_attention_is_found() -> None:
    kinds = ("sliding_attention", "full_attention")
    pairs = floor_pairs(2, 2)
    assert unlike_attention(pairs, kinds, kinds) == ()
    assert unlike_attention(pairs, kinds, kinds[1:] * 2) == (pairs[0],)
