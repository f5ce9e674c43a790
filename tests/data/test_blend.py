"""Blends keep their proportions at every moment and answer anywhere at the same cost."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data import blend as blends
from megatron_lite.data.blend import Blend, whole_shares
from megatron_lite.kernels import host

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


def test_order_of_equal_weights_is_a_round():
    members = [Blend([Fraction(1)] * 4)(draw)[0] for draw in range(12)]
    assert members == list(itertools.chain(*[[0, 1, 2, 3]] * 3))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any))
def test_compiled_or_not_the_draws_are_the_same(counts):
    counts = whole_shares([Fraction(count) for count in counts])
    compiled = host.module().draws_of_a_period(counts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host, "module", lambda: None)
        assert np.array_equal(blends._draws_of_a_period(counts), compiled)


@given(weight_lists, st.integers(0, 400))
def test_how_many_were_drawn_and_when_a_sample_is(weights, draws):
    blend = Blend(weights)
    drawn = [blend(draw) for draw in range(draws)]
    assert blend.drawn(draws) == [sum(member == i for member, _ in drawn) for i in range(len(weights))]
    assert [blend.draw_of(*each) for each in drawn] == list(range(draws))


def test_a_weight_of_zero_is_never_drawn():
    blend = Blend([Fraction(0), Fraction(2, 3), Fraction(1, 3)])
    assert blend.counts == [0, 2, 1] and {blend(draw)[0] for draw in range(30)} == {1, 2}
    assert whole_shares([Fraction(0), *[Fraction(10**9 + i) for i in range(7)]], 1000)[0] == 0
