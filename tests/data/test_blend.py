"""Blends keep their proportions at every moment and answer anywhere at the same cost."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.blend import Blend, parse_data_path, whole_shares
from megatron_lite.errors import ConfigError

weight_lists = st.lists(st.integers(1, 60), min_size=1, max_size=9).map(lambda whole: [Fraction(w) for w in whole])


@given(weight_lists)
def test_counts_stay_within_one_of_their_share(weights):
    blend, total = Blend(weights), sum(weights)
    counts = [0] * len(weights)
    for draw in range(2 * blend.period + 3):
        member, number = blend(draw)
        assert number == counts[member]
        counts[member] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (draw + 1) * weight / total) < 1


@given(weight_lists, st.integers(0, 10**12))
def test_a_far_draw_continues_the_walk(weights, periods):
    blend = Blend(weights)
    for draw in range(min(blend.period, 20)):
        member, number = blend(draw)
        assert blend(periods * blend.period + draw) == (member, periods * blend.counts[member] + number)


def test_decimal_weights_are_exact():
    prefixes, weights = parse_data_path(["0.7", "data/web", "0.25", "data/code", "5e-2", "data/math"])
    assert prefixes == ["data/web", "data/code", "data/math"]
    assert Blend(weights).counts == [14, 5, 1]


@given(st.lists(st.integers(1, 10**15), min_size=2, max_size=30))
def test_awkward_weights_are_rounded_to_one_period(weights):
    counts = whole_shares([Fraction(w) for w in weights], largest_period=1000)
    exact = np.array([1000 * w / sum(weights) for w in weights])
    assert min(counts) >= 1
    if sum(counts) == 1000:
        assert all(abs(count - share) < 1 or count == 1 for count, share in zip(counts, exact, strict=True))
    else:
        assert sum(counts) < 1000 + len(weights)


def test_a_rounded_blend_gives_every_sample_once():
    blend = Blend([Fraction(10**9 + i) for i in range(7)])
    assert blend.period == 1 << 18
    seen = [set() for _ in range(7)]
    for draw in range(0, 5000):
        member, number = blend(draw)
        seen[member].add(number)
    assert [numbers == set(range(len(numbers))) for numbers in seen] == [True] * 7
    assert max(map(len, seen)) - min(map(len, seen)) <= 2


def test_prefixes_alone_have_no_weights():
    assert parse_data_path(["data/web"]) == (["data/web"], None)
    assert parse_data_path(["data/web", "data/2024"]) == (["data/web", "data/2024"], None)
    assert parse_data_path(["1", "data/web"]) == (["data/web"], [1])


@pytest.mark.parametrize(
    "entries", [["0.7", "data/web", "0.3"], ["data/web", "0.7"], ["0.7", "0.3", "a", "b"], ["1", "a", "b", "c"], ["3"]]
)
def test_weights_and_prefixes_must_alternate(entries):
    with pytest.raises(ConfigError, match="a weight before every prefix"):
        parse_data_path(entries)


@pytest.mark.parametrize("weight", ["0", "-0.5", "0.0"])
def test_weights_are_above_zero(weight):
    with pytest.raises(ConfigError, match=f"data/b the weight {weight}"):
        parse_data_path(["1", "data/a", weight, "data/b"])


def test_order_of_equal_weights_is_a_round():
    members = [Blend([Fraction(1)] * 4)(draw)[0] for draw in range(12)]
    assert members == list(itertools.chain(*[[0, 1, 2, 3]] * 3))
