"""How much of each set: temperature, UniMax, segments, caps, a curriculum. Sets go on where they were."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.data.data_path import Entry
from megatron_lite.data.mixture import SetSize, is_mixed, parse_segments, tempered, training_mixture, unimax
from megatron_lite.data.segments import PERIOD_OF_CHANGES, Segment, SegmentedBlend
from megatron_lite.errors import ConfigError

weights = st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any)


def segments_of(lengths, all_weights):
    firsts = itertools.accumulate(lengths, initial=0)
    return [Segment(first, tuple(map(Fraction, w))) for first, w in zip(firsts, all_weights, strict=False)]


def mixture(sizes, total=None, given=None, **options):
    """Of entries with these numbers of samples, one of several sets where a list stands for it."""
    sizes = [size if isinstance(size, list) else [size] for size in sizes]
    given = given or [None] * len(sizes)
    entries = [
        Entry(tuple(f"{i}_{j}" for j in range(len(of))), weight and Fraction(weight))
        for i, (of, weight) in enumerate(zip(sizes, given, strict=True))
    ]
    sets = [[SetSize(n, 10 * n, Fraction(10)) for n in of] for of in sizes]
    return training_mixture(MixtureConfig(**options), entries, sets, total)


def weights_at(mixed, sample):
    segment = max((s for s in mixed.segments if s.first <= sample), key=lambda s: s.first)
    return [float(weight / sum(segment.weights)) for weight in segment.weights]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.lists(weights, min_size=5, max_size=5))
def test_sets_go_on_where_they_were_and_keep_their_shares(lengths, all_weights):
    segments = segments_of(lengths, all_weights)
    blend = SegmentedBlend(segments, 50)
    seen, due = [0, 0, 0], [Fraction(0)] * 3
    for draw in range(sum(lengths) + 120):
        assert blend.drawn(draw) == seen
        segment = max((s for s in segments if s.first <= draw), key=lambda s: s.first)
        member, number = blend(draw)
        assert number == seen[member] and segment.weights[member]
        seen[member] += 1
        due = [have + weight / sum(segment.weights) for have, weight in zip(due, segment.weights, strict=True)]
        # What a set has too much, and no weight any more, the others lack.
        assert all(abs(count - share) < 4 for count, share in zip(seen, due, strict=True))
    assert [blend(draw) for draw in (0, sum(lengths))] == [SegmentedBlend(segments, 50)(d) for d in (0, sum(lengths))]


@pytest.mark.parametrize("sets", [1, 8, 31, 63])
@pytest.mark.parametrize("length", [1, 3, 10, 40])
def test_shares_hold_over_segments_that_are_shorter_than_there_are_sets(sets, length):
    """One set that has half of the draws, and its easier of two shares fall, beside many that are drawn alike."""
    others = (Fraction(1, 2 * sets),) * sets
    segments = [
        Segment(length * i, (Fraction(100 - i, 200), Fraction(i, 200), *others)) for i in range(100)
    ]  # fmt: skip
    blend = SegmentedBlend(segments, PERIOD_OF_CHANGES)
    due = [Fraction(0)] * (sets + 2)
    for segment in segments:
        drawn = blend.drawn(segment.first)
        assert sum(drawn) == segment.first
        assert all(abs(count - share) < 2.5 for count, share in zip(drawn, due, strict=True))
        due = [have + length * weight for have, weight in zip(due, segment.weights, strict=True)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.lists(weights, min_size=4, max_size=4),
    st.lists(st.integers(0, 80), min_size=3, max_size=3),
    st.booleans(),
)
def test_no_set_is_drawn_beyond_its_limit(lengths, all_weights, limits, redistribute):
    segments = segments_of(lengths, all_weights)
    plain = SegmentedBlend(segments, 50)
    blend = SegmentedBlend(segments, 50, limits=limits, redistribute=redistribute)
    end = blend.ends_after
    # The last segment goes on, so that some limit ends it.
    assert plain.ends_after is None and end is not None and end <= sum(limits)
    if end == 0:
        return
    drawn = blend.drawn(end)
    assert all(count <= limit for count, limit in zip(drawn, limits, strict=True))
    if not redistribute:
        assert [blend(k) for k in range(end)] == [plain(k) for k in range(end)]
        member, number = plain(end)
        assert number == limits[member] == drawn[member]
    else:
        ended = zip(segments[-1].weights, drawn, limits, strict=True)
        assert all(count == limit for weight, count, limit in ended if weight)
        for segment in blend.segments:
            if segment.exhausted is not None:
                assert segment.weights[segment.exhausted] == 0
                assert blend.drawn(segment.first)[segment.exhausted] == limits[segment.exhausted]


@pytest.mark.parametrize("sets", [8, 31, 63])
def test_those_that_are_left_share_alike_while_one_after_another_is_exhausted(sets):
    limits = [20 + 37 * i % 180 for i in range(sets)]
    every = (Fraction(1),) * sets
    blend = SegmentedBlend([Segment(0, every)], PERIOD_OF_CHANGES, limits=limits, redistribute=True)
    assert blend.ends_after == sum(limits) and len(blend.segments) > sets / 2
    for segment in blend.segments:
        drawn = [n for n, weight in zip(blend.drawn(segment.first), segment.weights, strict=True) if weight]
        assert max(drawn) - min(drawn) < 8


def test_a_later_segment_begins_at_once_where_the_one_before_has_no_set_left():
    first, last = (Fraction(1), Fraction(0), Fraction(0)), (Fraction(1), Fraction(1), Fraction(0))
    blend = SegmentedBlend([Segment(0, first), Segment(100, last)], limits=[10, 20, 30], redistribute=True)
    assert [segment.first for segment in blend.segments] == [0, 10] and blend.ends_after == 30
    assert blend.drawn(30) == [10, 20, 0]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=12), st.integers(1, 10**10), st.sampled_from([1, 1.5, 4]))
def test_unimax_is_the_papers_algorithm(sizes, budget, epochs):
    left, expected = float(budget), {}
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for rank, i in enumerate(order):
        share = left / (len(sizes) - rank)
        expected[i] = sizes[i] * epochs if share > sizes[i] * epochs else share
        left -= expected[i]
    found = unimax(sizes, budget, Fraction(epochs))
    assert [float(weight) for weight in found] == pytest.approx([expected[i] for i in range(len(sizes))])
    assert all(weight <= Fraction(epochs) * size for weight, size in zip(found, sizes, strict=True))


def test_temperature():
    assert tempered([100, 400], 1) == [Fraction(1, 4), 1]
    assert [float(weight) for weight in tempered([100, 400], 2)] == pytest.approx([0.5, 1])
    assert min(tempered([1, 10**15], 0.5)) > 0
    assert weights_at(mixture([100, 300], data_blend_temperature=1), 0) == pytest.approx([0.25, 0.75])
    assert weights_at(mixture([100, 1600], data_blend_temperature=2), 0) == pytest.approx([0.2, 0.8])


def test_unimax_of_a_run():
    mixed = mixture([10, 1000, 2000], total=800, data_blend_unimax=2)
    assert weights_at(mixed, 0) == pytest.approx([20 / 800, 390 / 800, 390 / 800], abs=1e-4)
    assert mixed.drawn(800)[0] == 20
    with pytest.raises(ConfigError, match="give --train-iters, --train-samples or --train-tokens"):
        mixture([10, 20], data_blend_unimax=2)


def test_shares_of_tokens_are_told_from_shares_of_samples():
    entries = [Entry(("a",), Fraction(1)), Entry(("b",), Fraction(1))]
    sets = [[SetSize(10, 80, Fraction(8))], [SetSize(10, 40, Fraction(4))]]
    for blend_by, expected in (("samples", [1 / 2, 1 / 2]), ("tokens", [1 / 3, 2 / 3])):
        mixed = training_mixture(MixtureConfig(blend_by=blend_by), entries, sets, None)
        assert weights_at(mixed, 0) == pytest.approx(expected)


def test_weights_change_at_shares_of_the_run_and_linearly():
    texts = ("50% 1 3", "1_000/4 3 1")
    mixed = mixture([9, 9], total=1200, given=[1, 1], data_path_segments=texts)
    assert [segment.first for segment in mixed.segments] == [0, 600, 700, 800, 900, 1000]
    assert [weights_at(mixed, at)[0] for at in (0, 599, 600, 700, 850, 999, 1000, 10**6)] == [
        0.5, 0.5, 0.25, 0.375, 0.5, 0.625, 0.75, 0.75,
    ]  # fmt: skip
    assert mixed.segments[1:] == mixture([9, 9], 1200, [7, 1], data_path_segments=texts).segments[1:]
    assert parse_segments(["0 2 1"], [Fraction(1)] * 2, None) == [(0, [2, 1])]
    assert [first for first, _ in parse_segments(["100%/4 0 1"], [Fraction(1)] * 2, 1200)] == [0, 300, 600, 900, 1200]


def test_shares_that_are_one_sample_of_a_short_run_are_in_order_still():
    texts = ("1% 1 3", "98%/1000 1 4", "99% 0 1")
    short = mixture([9, 9], total=16, given=[1, 1], data_path_segments=texts)
    assert weights_at(short, 0)[0] == pytest.approx(0.25, abs=0.01) and weights_at(short, 15) == [0, 1]
    assert [segment.first for segment in short.segments] == list(range(16))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["80% 1"], "has 1 weights, 1 of them above 0, and the data path names 2 sets"),
        (["80% 0 0"], "has 2 weights, 0 of them above 0"),
        (["x 1 1"], "cannot be read; write where it begins"),
        (["10 1 -1"], "cannot be read"),
        (["10 1e100 1"], "cannot be read"),
        ([""], "cannot be read"),
        (["20 1 1", "20 1 2"], "begins at sample 20, not behind the one before, at 20"),
        (["50% 1 1"], "length in epochs is not known"),
        (["80% 1 1", "80% 1 2"], "begins at sample 80, not behind the one before, at 80"),
        (["100.5%/2 1 1"], "begins when the run is over; give a share below 100%"),
        (["100% 1 1"], "begins when the run is over"),
        (["100%/1001 1 1"], "changes in 1,001 steps.* at most 1,000"),
    ],
)
def test_a_segment_that_cannot_be_read_says_how(texts, message):
    total = None if "not known" in message else 100
    with pytest.raises(ConfigError, match=message):
        parse_segments(texts, [Fraction(1)] * 2, total)


@pytest.mark.parametrize("sizes", [[10], [10, 40]])
def test_sets_without_weights_end_a_run_too(sizes):
    entries = [Entry((str(size),)) for size in sizes]
    assert is_mixed(MixtureConfig(when_exhausted="stop"), entries) and not is_mixed(MixtureConfig(), entries)
    assert {mixture(sizes, when_exhausted=end).ends_after for end in ("stop", "redistribute")} == {sum(sizes)}


def test_caps_are_the_decimals_that_were_written():
    assert mixture([10], when_exhausted="stop", data_max_epochs=1.1).ends_after == 11
    assert mixture([10, 990], total=1000, data_blend_unimax=1.1).drawn(1000) == [11, 989]


def test_exhausted_sets_repeat_or_end_the_run_or_give_their_share_away():
    assert mixture([10, 40], given=[1, 1]).ends_after is None
    stopped = mixture([10, 40], given=[1, 1], when_exhausted="stop")
    assert stopped.ends_after == 20 and stopped.drawn(20) == [10, 10]
    twice = mixture([10, 40], given=[1, 1], when_exhausted="stop", data_max_epochs=2.5)
    assert twice.ends_after == 50 and twice.drawn(50) == [25, 25]
    shared = mixture([10, 40], given=[1, 1], when_exhausted="redistribute")
    assert shared.ends_after == 50 and shared.drawn(50) == [10, 40]
    assert [(s.first, s.exhausted) for s in shared.segments] == [(0, None), (20, 0)]


def test_caps_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="exhausted before the first sample: sets of 1, 0 samples are left"):
        mixture([100, 20], given=[1, 10**6], when_exhausted="stop", data_max_epochs=0.01)


@pytest.mark.parametrize("pacing", ["linear", "root", "step"])
def test_a_curriculum_opens_the_easiest_first_and_then_all(pacing):
    options = {"curriculum_difficulty": pacing, "curriculum_difficulty_samples": 1000}
    mixed = mixture([[10, 20, 30, 40], 50], given=[3, 1], **options)
    assert weights_at(mixed, 0) == pytest.approx([0.75, 0, 0, 0, 0.25])
    assert weights_at(mixed, 1000) == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.25])
    hardest = [weights_at(mixed, at)[3] for at in range(0, 1001, 10)]
    assert hardest == sorted(hardest) and all(weights_at(mixed, at)[4] == 0.25 for at in (0, 500, 999))
    half = weights_at(mixed, 500)
    opened = {"linear": 0.55, "root": 0.505**0.5, "step": 0.3}[pacing]
    assert half[0] == pytest.approx(0.75 * 0.1 / opened) and half[1] == pytest.approx(0.75 * 0.2 / opened)
    natural = mixture([[10, 20, 30, 40], 50], **options)
    assert weights_at(natural, 1000) == pytest.approx([n / 150 for n in (10, 20, 30, 40, 50)])
