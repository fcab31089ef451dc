"""Laws of the choice itself, on sums that were made up: ties, order, bounds."""

from __future__ import annotations

import numpy as np
import pytest

from pkt.consistent import Sums, choose_subnetwork, subnetwork_window
from pkt.heads import Heads
from pkt.projections import Pair
from pkt.records import Projection

THEIRS, OURS = Heads(3, 2, 6, 6), Heads(2, 1, 4, 4)
WIDTH, NEURONS = (10, 4), (9, 5)  # of the teacher, of the student


def shapes(heads: Heads, width: int, neurons: int) -> dict[str, tuple[int, int]]:
    query, kv = heads.query * heads.dim, heads.groups * heads.dim
    return {
        "q": (query, width), "k": (kv, width), "v": (kv, width), "o": (width, query),
        "gate": (neurons, width), "up": (neurons, width), "down": (width, neurons),
    }  # fmt: skip


BIG = shapes(THEIRS, WIDTH[0], NEURONS[0])
SMALL = shapes(OURS, WIDTH[1], NEURONS[1])
PAIRS = [
    Pair(role, Projection(role, role, None, *SMALL[role]), Projection(role, role, None, *big), 1)
    for role, big in BIG.items()
]


def sums(score: dict[str, np.ndarray]) -> dict[str, Sums]:
    return {role: (each.sum(1), each.sum(0)) for role, each in score.items()}


def drawn(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {role: draw.random(shape) for role, shape in BIG.items()}


def test_equal_scores_go_to_the_lower_index() -> None:
    equal = sums({role: np.ones(shape) for role, shape in BIG.items()})
    network = choose_subnetwork(PAIRS, [equal] * 2, THEIRS, OURS)
    assert network.residual == (0, 1, 2, 3)
    for part in network.layers:
        assert part.groups == (0, 1)
        assert part.heads == (0, 2), "the first query head of each group"
        assert part.rope_dims == ((0, 1, 3, 4),) * 2, "the first pairs, first halves first"
        assert part.value_dims == ((0, 1, 2, 3),) * 2
        assert part.neurons == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("seed", range(5))
def test_channels_are_of_all_layers_and_the_rest_of_each(seed: int) -> None:
    """Layers in another order: the same channels; each layer's own sets go with it."""
    layers = [sums(drawn(seed + at)) for at in (0, 100, 200)]
    one = choose_subnetwork(PAIRS, layers, THEIRS, OURS)
    turned = choose_subnetwork(PAIRS, reversed(layers), THEIRS, OURS)
    assert one.residual == turned.residual
    assert one.layers == turned.layers[::-1]
    assert len(set(one.layers)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_a_teacher_in_another_order_gives_the_same_places(seed: int) -> None:
    """Channels, neurons, groups and RoPE pairs permuted: what is chosen moves with them."""
    score, draw = drawn(seed), np.random.default_rng(seed)
    channels, neurons, groups, pairs = (draw.permutation(n) for n in (10, 9, 3, 3))
    dims = np.concatenate([pairs, pairs + 3])
    kv = (groups[:, None] * 6 + dims).ravel()
    query = ((groups[:, None] * 2 + np.arange(2)).reshape(-1, 1) * 6 + dims).ravel()
    order = {"q": query, "k": kv, "v": kv, "o": query}
    moved = {}
    for role, each in score.items():
        inner = order.get(role, neurons)
        moved[role] = (
            each[channels][:, inner] if role in ("o", "down") else each[inner][:, channels]
        )
    before = choose_subnetwork(PAIRS, [sums(score)], THEIRS, OURS)
    after = choose_subnetwork(PAIRS, [sums(moved)], THEIRS, OURS)
    assert sorted(channels[list(after.residual)]) == list(before.residual)
    for role in BIG:
        found, wanted = after.indices(0, role), before.indices(0, role)
        inner = order.get(role, neurons)
        axis = 1 if role in ("o", "down") else 0
        assert sorted(inner[list(found[axis])]) == sorted(wanted[axis]), role


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_at_least_what_the_window_holds(seed: int) -> None:
    score = drawn(seed)
    network = choose_subnetwork(PAIRS, [sums(score)], THEIRS, OURS)
    for pair in PAIRS:
        window = subnetwork_window(network, 0, pair, sums(score)[pair.key], "t")
        assert window.rows is not None
        assert window.cols is not None
        cut = score[pair.key][list(window.rows)][:, list(window.cols)]
        assert cut.shape == SMALL[pair.key]
        assert cut.sum() <= window.score <= score[pair.key].sum()
