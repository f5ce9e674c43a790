"""A blend whose weights change on the way; each set goes on where it was."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction

from megatron_lite.data.blend import LARGEST_PERIOD, Blend, whole_shares

PERIOD_OF_CHANGES = 1 << 14
"""Draws over which the weights of one of several segments are exact: fewer than of a blend that stays."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Weights of all sets, 0 for one that is not drawn, from draw `first` until the next segment."""

    first: int
    weights: tuple[Fraction, ...]
    exhausted: int | None = None
    """The set that may not be gone through again from here on."""

    def blend(self, largest_period: int) -> Blend:
        return Blend(self.weights, largest_period)


class SegmentedBlend:
    """Which set draw k takes from and which of its samples: how often a set was drawn before, in all segments.

    Within a segment a set is within 1 sample of its share at any moment. The first segment begins at 0.
    """

    def __init__(self, segments: Sequence[Segment], largest_period: int = LARGEST_PERIOD):
        self.segments = segments
        self._largest_period = largest_period
        self._firsts = [segment.first for segment in segments]
        self._before = [[0] * len(segments[0].weights)]
        for segment, following in itertools.pairwise(segments):
            drawn = segment.blend(largest_period).drawn(following.first - segment.first)
            self._before.append([sum(both) for both in zip(self._before[-1], drawn, strict=True)])
        self._current = (0, segments[0].blend(largest_period))

    def _at(self, draw: int) -> tuple[int, Blend]:
        """The segment of a draw."""
        at = bisect.bisect_right(self._firsts, draw) - 1
        known, blend = self._current
        if known != at:
            blend = self.segments[at].blend(self._largest_period)
            # One assignment: threads that read ahead may be in two segments.
            self._current = (at, blend)
        return at, blend

    def __call__(self, draw: int) -> tuple[int, int]:
        """Set and its sample number of draw `draw`, from 0."""
        at, blend = self._at(draw)
        member, number = blend(draw - self._firsts[at])
        return member, self._before[at][member] + number

    def counts(self, segment: Segment) -> list[int]:
        """How often each set is drawn in one period of a segment."""
        return whole_shares(segment.weights, self._largest_period)

    def drawn(self, draws: int) -> list[int]:
        """How many samples each set gives in the first `draws` draws."""
        at, blend = self._at(draws)
        return [sum(both) for both in zip(self._before[at], blend.drawn(draws - self._firsts[at]), strict=True)]


def keep_within(
    segments: Sequence[Segment], limits: Sequence[int], *, redistribute: bool, largest_period: int
) -> tuple[list[Segment], int | None]:
    """The segments in which no set gives more than its limit of samples, and the draw at which they end if they do.

    They end where the first set would go beyond its limit; with `redistribute` its share goes to the
    others from there on, in proportion, and they end where no other is left.
    """
    kept: list[Segment] = []
    left = list(limits)
    empty: set[int] = set()
    for segment, stop in zip(segments, [*(following.first for following in segments[1:]), None], strict=True):
        first, exhausted = segment.first, None
        while True:
            weights = tuple(Fraction(0) if i in empty else weight for i, weight in enumerate(segment.weights))
            if not any(weights):
                return kept, first
            part = Segment(first, weights, exhausted)
            blend = part.blend(largest_period)
            ends, ended = min((first + blend.draw_of(i, left[i]), i) for i, count in enumerate(blend.counts) if count)
            until = ends if stop is None else min(ends, stop)
            if until > first:
                kept.append(part)
                left = [have - drawn for have, drawn in zip(left, blend.drawn(until - first), strict=True)]
            if until == stop:
                break
            if not redistribute:
                return kept, ends
            empty.add(ended)
            first, exhausted = ends, ended
    raise AssertionError("the last segment has no end of its own")
