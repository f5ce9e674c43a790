"""How often each token set is drawn from in training, and when that changes.

Everything is exact arithmetic on the configuration and the sizes of the sets: fractions, no floats that
another machine might round otherwise.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.data.blend import LARGEST_PERIOD
from megatron_lite.data.data_path import Entry
from megatron_lite.data.segments import PERIOD_OF_CHANGES, Segment, SegmentedBlend
from megatron_lite.errors import ConfigError

_POINT = re.compile(r"(\d[\d_]*|(?:\d+\.?\d*|\.\d+)%)(?:/([1-9]\d*))?")
# Of more digits of an exponent a fraction would fill the memory.
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?")
_FINEST = 10**9
_RAMP_SEGMENTS = 100
"""In which a linear or root curriculum opens."""
_MOST_STEPS = 1000
"""Of one change of --data-path-segments."""


@dataclasses.dataclass(frozen=True)
class SetSize:
    """What the weights of a token set are computed from."""

    samples: int
    tokens: int
    targets: Fraction
    """Tokens that one sample trains on, on average."""


def is_mixed(data: MixtureConfig, entries: Sequence[Entry]) -> bool:
    """Whether training draws from each set by itself, where prefixes without weights are else shuffled as one."""
    asks = (data.data_blend_temperature, data.data_blend_unimax, data.curriculum_difficulty, data.data_max_epochs)
    return (
        entries[0].weight is not None
        or any(asked is not None for asked in asks)
        or bool(data.data_path_segments)
        or data.when_exhausted != "repeat"
        or any(entry.max_epochs is not None for entry in entries)
    )


def constant_mixture(entries: Sequence[Entry], sets: Sequence[Sequence[SetSize]], blend_by: str) -> SegmentedBlend:
    """The weights of a data path as they stand, for validation and testing; `sets` are those of each entry."""
    weights = _by_samples([entry.weight for entry in entries], sets, blend_by)
    return SegmentedBlend([Segment(0, _spread(weights, _natural_shares(sets)))])


def training_mixture(
    data: MixtureConfig, entries: Sequence[Entry], sets: Sequence[Sequence[SetSize]], total_samples: int | None
) -> SegmentedBlend:
    """The blend of a run of `total_samples` samples, None where its length is in epochs.

    `sets` are those of each entry. Raises ConfigError for segments that cannot be read, and for what
    needs the length of the run where that is not known.
    """
    points = _points(data, entries, sets, total_samples)
    shares = _opening(data, sets)
    firsts = sorted({first for first, _ in (*points, *shares)})
    segments: list[Segment] = []
    for first in firsts:
        weights = _spread(_value_at(points, first), _value_at(shares, first))
        if not segments or segments[-1].weights != weights:
            segments.append(Segment(first, weights))
    if data.when_exhausted == "repeat":
        return SegmentedBlend(segments, LARGEST_PERIOD if len(segments) == 1 else PERIOD_OF_CHANGES)
    default = Fraction(str(data.data_max_epochs or 1))
    limits = [
        int((entry.max_epochs or default) * size.samples)
        for entry, of in zip(entries, sets, strict=True)
        for size in of
    ]
    blend = SegmentedBlend(
        segments, PERIOD_OF_CHANGES, limits=limits, redistribute=data.when_exhausted == "redistribute"
    )
    if not blend.segments:
        raise ConfigError(
            f"the data are exhausted before the first sample: sets of {', '.join(map(str, limits[:12]))} samples are "
            "left by data_max_epochs or PREFIX:EPOCHS; allow more."
        )
    return blend


Point = tuple[int, list[Fraction]]
"""A number of samples, and the weights of all entries from there on."""


def _points(
    data: MixtureConfig, entries: Sequence[Entry], sets: Sequence[Sequence[SetSize]], total_samples: int | None
) -> list[Point]:
    base = _base_weights(data, entries, sets, total_samples)
    points = parse_segments(data.data_path_segments, base, total_samples)
    return [(first, _by_samples(weights, sets, data.blend_by)) for first, weights in points]


def _base_weights(
    data: MixtureConfig, entries: Sequence[Entry], sets: Sequence[Sequence[SetSize]], total_samples: int | None
) -> list[Fraction]:
    if entries[0].weight is not None:
        return [entry.weight for entry in entries]
    if data.data_blend_temperature is not None:
        return tempered([sum(size.tokens for size in of) for of in sets], data.data_blend_temperature)
    samples = [sum(size.samples for size in of) for of in sets]
    if data.data_blend_unimax is None:
        return list(map(Fraction, samples))
    if total_samples is None:
        raise ConfigError(
            "data_blend_unimax divides the samples of the run, whose length in epochs is not known before; give "
            "--train-iters, --train-samples or --train-tokens."
        )
    return unimax(samples, total_samples, Fraction(str(data.data_blend_unimax)))


def tempered(tokens: Sequence[int], temperature: float) -> list[Fraction]:
    """Weights in proportion to tokens^(1 / temperature), to nine digits."""
    powers = [(count / max(tokens)) ** (1 / temperature) for count in tokens]
    return [max(Fraction(1, _FINEST), Fraction(round(power * _FINEST), _FINEST)) for power in powers]


def unimax(samples: Sequence[int], budget: int, max_epochs: Fraction) -> list[Fraction]:
    """Samples of a budget that each set gets: an even share of what smaller ones leave, at most `max_epochs` of it.

    Chung et al. 2023, "UniMax: fairer and more effective language sampling for large-scale multilingual pretraining".
    """
    weights = [Fraction(0)] * len(samples)
    left = Fraction(budget)
    by_size = sorted(range(len(samples)), key=lambda i: samples[i])
    for rank, i in enumerate(by_size):
        weights[i] = min(left / (len(samples) - rank), max_epochs * samples[i])
        left -= weights[i]
    return weights


def parse_segments(texts: Sequence[str], base: list[Fraction], total_samples: int | None) -> list[Point]:
    """What --data-path-segments makes of the weights `base`, linear changes written out, by ascending samples from 0.

    Of those that begin within one sample, as shares of a short run may, the last holds. Raises ConfigError for a text
    that cannot be read, one out of order, and for shares of a run whose length is not known.
    """
    points: list[Point] = [(0, base)]
    place_before = Fraction(0)
    for number, text in enumerate(texts):
        beginning, *words = text.split() or [""]
        read = _POINT.fullmatch(beginning)
        if read is None or any(_WEIGHT.fullmatch(word) is None for word in words):
            raise ConfigError(
                f'data_path_segments="{text}" cannot be read; write where it begins and a weight for each set: '
                '"80% 0.2 0.8", "120000 0.2 0.8", or "90%/20 0 1" for a change in 20 steps.'
            )
        weights = [Fraction(word) for word in words]
        if len(weights) != len(base) or not any(weights):
            raise ConfigError(
                f'data_path_segments="{text}" has {len(weights)} weights, {sum(map(bool, weights))} of them above 0, '
                f"and the data path names {len(base)} sets; give one for each, not all 0."
            )
        place = _place(read[1], text, total_samples, is_change=read[2] not in (None, "1"))
        if number == 0 and place == 0:
            points = [(0, weights)]
            continue
        if place <= place_before:
            raise ConfigError(
                f'data_path_segments="{text}" begins at sample {float(place):,.10g}, not behind the one before, at '
                f"{float(place_before):,.10g}; give them in order."
            )
        place_before, first, (begin, before) = place, int(place), points[-1]
        steps = int(read[2] or 1)
        if steps > _MOST_STEPS:
            raise ConfigError(
                f'data_path_segments="{text}" changes in {steps:,} steps, each of which is planned when the data are '
                f"opened; give at most {_MOST_STEPS:,}."
            )
        points += [
            (begin + (first - begin) * i // steps, _between(before, weights, Fraction(i, steps)))
            for i in range(1, steps)
        ]
        points.append((first, weights))
    return points


def _place(text: str, whole: str, total_samples: int | None, is_change: bool) -> Fraction:
    """A number of samples, not yet a whole one. A change in steps may be complete when the run ends."""
    if not text.endswith("%"):
        return Fraction(text.replace("_", ""))
    share = Fraction(text[:-1]) / 100
    if share > 1 or (share == 1 and not is_change):
        raise ConfigError(f'data_path_segments="{whole}" begins when the run is over; give a share below 100%.')
    if total_samples is None:
        raise ConfigError(
            f'data_path_segments="{whole}" begins at a share of the run, whose length in epochs is not known before; '
            "give --train-iters, --train-samples or --train-tokens, or a number of samples."
        )
    return share * total_samples


def _between(before: list[Fraction], after: list[Fraction], at: Fraction) -> list[Fraction]:
    return [(1 - at) * a / sum(before) + at * b / sum(after) for a, b in zip(before, after, strict=True)]


def _by_samples(weights: list[Fraction], sets: Sequence[Sequence[SetSize]], blend_by: str) -> list[Fraction]:
    """Weights as shares of samples."""
    if blend_by == "samples":
        return weights
    targets = [sum(size.targets * size.samples for size in of) / sum(size.samples for size in of) for of in sets]
    return [weight / of for weight, of in zip(weights, targets, strict=True)]


Shares = list[list[Fraction]]
"""Of each entry of the data path, the shares of its sets in what it gives."""


def _natural_shares(sets: Sequence[Sequence[SetSize]]) -> Shares:
    return [[Fraction(size.samples, sum(each.samples for each in of)) for size in of] for of in sets]


def _opening(data: MixtureConfig, sets: Sequence[Sequence[SetSize]]) -> list[tuple[int, Shares]]:
    """The shares within entries from some sample on: those of a curriculum open from the first set to the last."""
    natural = _natural_shares(sets)
    if data.curriculum_difficulty is None:
        return [(0, natural)]
    samples = data.curriculum_difficulty_samples
    steps = max(1, max(map(len, sets)) - 1) if data.curriculum_difficulty == "step" else _RAMP_SEGMENTS
    opening = [
        (
            samples * step // steps,
            [_open(shares, Fraction(step, steps), data.curriculum_difficulty) for shares in natural],
        )
        for step in range(steps)
    ]
    return [*opening, (samples, natural)]


def _open(shares: list[Fraction], progress: Fraction, pacing: str) -> list[Fraction]:
    """Shares of an entry's sets while the easiest part of them is open, all at progress 1.

    Competence-based curriculum (Platanios et al. 2019), which begins with the first set.
    """
    begin = shares[0]
    if pacing == "step":
        opened = sum(shares[: 1 + int(progress * (len(shares) - 1))])
    elif pacing == "linear":
        opened = begin + (1 - begin) * progress
    else:
        square = begin**2 + (1 - begin**2) * progress
        opened = max(begin, Fraction(round(float(square) ** 0.5 * _FINEST), _FINEST))
    covered, before = [], Fraction(0)
    for share in shares:
        covered.append(min(max(opened - before, Fraction(0)), share) / opened)
        before += share
    return covered


def _spread(weights: list[Fraction], shares: Shares) -> tuple[Fraction, ...]:
    """The weight of each set."""
    return tuple(weight * share for weight, of in zip(weights, shares, strict=True) for share in of)


def _value_at(points: Sequence[tuple[int, list]], sample: int) -> list:
    return points[bisect.bisect_right(points, sample, key=lambda point: point[0]) - 1][1]
