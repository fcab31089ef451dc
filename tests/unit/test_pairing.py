"""Layer pairing: the paper's own numbers, and laws for every depth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt.errors import IncompatibleError, UsageError
from pkt.pairing import (
    attributed_pairs,
    critical_pairs,
    floor_pairs,
    given_pairs,
    highest_layers,
    interpolated_pairs,
    most_kept,
    sources,
    span_starts,
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


@given(depths, st.data())
@settings(deadline=None)
def test_attribution_chooses_within_the_floor_rules_stretches(
    depth: tuple[int, int], data: st.DataObject
) -> None:
    scores = data.draw(st.lists(st.integers(0, 5), min_size=depth[0], max_size=depth[0]))
    floor = [pair.teacher for pair in floor_pairs(*depth)]
    for before, pair in zip([0, *floor], attributed_pairs(scores, *depth), strict=False):
        stretch = range(before + 1, floor[pair.student - 1] + 1)
        assert pair.teacher in stretch
        assert scores[pair.teacher - 1] == max(scores[layer - 1] for layer in stretch)
        assert not any(
            scores[n - 1] == scores[pair.teacher - 1] for n in stretch[: pair.teacher - stretch[0]]
        )


def test_the_highest_layers_are_named_in_order() -> None:
    assert highest_layers([1.0, 3.0, 3.0, 2.0], 3) == (2, 3, 4)
    assert highest_layers([1.0], 4) == (1,)


@given(depths)
@settings(deadline=None)
def test_spans_of_all_pairs_cover_the_teacher_once(depth: tuple[int, int]) -> None:
    """Added up they are the last state less the first."""
    pairs = floor_pairs(*depth)
    total: dict[int, float] = {}
    for pair, start in zip(pairs, span_starts(pairs, *depth), strict=True):
        for at, factor in sources(pair, "span", start).items():
            total[at] = total.get(at, 0.0) + factor
    assert {at: factor for at, factor in total.items() if factor} == {0: -1.0, depth[0]: 1.0}


def test_where_a_span_begins_if_the_layer_below_is_not_paired() -> None:
    """At the floor rule's layer for it, or else just below the pair."""
    assert span_starts([LayerPair(8, 4)], 10, 5) == (LayerPair(6, 3),)
    assert span_starts([LayerPair(5, 4)], 10, 5) == (LayerPair(4, 3),)
    assert span_starts([LayerPair(1, 4)], 10, 5) == (None,)
    assert span_starts([LayerPair(2, 1)], 10, 5) == (None,)
    with pytest.raises(UsageError, match="span"):
        span_starts([LayerPair(6, 3), LayerPair(6, 4)], 10, 5)


def test_what_targets_are_the_sum_of() -> None:
    mixed = LayerPair(4, 2, 0.25)
    assert sources(mixed, "hidden") == {4: 0.75, 5: 0.25}
    assert sources(mixed, "mlp") == {4: 0.75, 5: 0.25}
    assert sources(mixed, "block") == {3: -0.75, 4: 0.5, 5: 0.25}
    assert sources(LayerPair(4, 2, 0.5), "block") == {3: -0.5, 5: 0.5}
    assert sources(mixed, "span", LayerPair(2, 1)) == {2: -1.0, 4: 0.75, 5: 0.25}
    assert sources(LayerPair(1, 1), "span") == {0: -1.0, 1: 1.0}


@pytest.mark.parametrize(
    ("interface", "most"), [("hidden", 0), ("mlp", 1), ("attn", 1), ("block", 2), ("span", 2)]
)
def test_few_rows_are_kept_at_once(interface: str, most: int) -> None:
    for depth in ((5, 5), (9, 7), (40, 32)):
        pairs = floor_pairs(*depth)
        starts = span_starts(pairs, *depth) if interface == "span" else [None] * len(pairs)
        terms = [sources(p, interface, s) for p, s in zip(pairs, starts, strict=True)]
        assert most_kept(terms, sub_layers=interface in ("mlp", "attn")) == most
