"""A blend whose weights change on the way; each set goes on where it was."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from fractions import Fraction

from megatron_lite.data.blend import LARGEST_PERIOD, Blend, whole_shares

PERIOD_OF_CHANGES = 1 << 14
"""Draws over which the weights of one of several segments are exact: fewer than of a blend that stays."""
_ONE = 1 << 32
"""What a sample is in the sums of what sets are behind or ahead."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Weights of all sets, 0 for one that is not drawn, from draw `first` until the next segment."""

    first: int
    weights: tuple[Fraction, ...]
    exhausted: int | None = None
    """The set that may not be gone through again from here on."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Draws from `first` on, of which `counts` says how often each set is drawn in a period, to the next piece."""

    first: int
    counts: list[int]
    before: list[int]
    """Samples that each set has given before `first`."""

    def blend(self) -> Blend:
        return Blend(self.counts, sum(self.counts))


class SegmentedBlend:
    """Which set draw k takes from and which of its samples: how often a set was drawn before, in all segments.

    What a set lacks or has too much when a segment ends is made up for in the next in which it has a weight, so that
    shares hold over segments of a few draws each: a set that always has a weight is within a few samples of what it
    should have given by then. The first segment begins at 0.

    With `limits`, `segments` are those in which no set gives more samples than its limit, and `ends_after` is the
    draw at which they end: where the first set would go beyond its limit. With `redistribute` its share goes to the
    others from there on, in proportion; where no other is left, the next segment that has one begins at once.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        largest_period: int = LARGEST_PERIOD,
        *,
        limits: Sequence[int] | None = None,
        redistribute: bool = False,
    ):
        self.segments: list[Segment] = []
        self._largest_period = largest_period
        self._counts: dict[int, list[int]] = {}
        self._pieces: list[_Piece] = []
        sets = len(segments[0].weights)
        # Of each set, how many samples it has given, and how many `_ONE`ths of a sample it should have given more.
        self._given, self._lacks = [0] * sets, [0] * sets
        self.ends_after = self._lay_out(segments, limits, redistribute)
        self._firsts = [piece.first for piece in self._pieces]
        self._current = (0, self._pieces[0].blend()) if self._pieces else None

    def _lay_out(self, segments: Sequence[Segment], limits: Sequence[int] | None, redistribute: bool) -> int | None:
        at, empty = 0, set()
        for segment, stop in zip(segments, [*(following.first for following in segments[1:]), None], strict=True):
            exhausted = segment.exhausted
            while at != stop:
                weights = tuple(Fraction(0) if i in empty else weight for i, weight in enumerate(segment.weights))
                if not any(weights):
                    break
                until, ended = self._lay(Segment(at, weights, exhausted), stop, limits)
                if ended is None and until is None:
                    return None
                at = until
                if ended is None:
                    break
                if not redistribute:
                    return at
                empty.add(ended)
                exhausted = ended
        return at

    def _lay(self, segment: Segment, stop: int | None, limits: Sequence[int] | None) -> tuple[int | None, int | None]:
        """Lay a segment out until `stop` or until a set has reached its limit: where it ends, and that set."""
        at, shares = segment.first, whole_shares(segment.weights, self._largest_period)
        period = sum(shares)
        length = None if stop is None else stop - at
        if length is None:
            first = period * any(self._lacks)
        else:
            first = length if length <= self._largest_period else length % period
        parts = [(first, self._made_up_for(shares, first)), (None if length is None else length - first, shares)]
        for length, counts in parts:
            if length == 0:
                continue
            piece = _Piece(at, counts, list(self._given))
            ends, ended = (length, None) if limits is None else _end(piece, length, limits)
            if ends != 0:
                if not self.segments or self.segments[-1] is not segment:
                    self.segments.append(segment)
                    self._counts[segment.first] = shares
                self._pieces.append(piece)
            if ends is None:
                return None, None
            given = [n * ends // sum(counts) for n in counts] if ended is None else piece.blend().drawn(ends)
            for i, (n, share) in enumerate(zip(given, shares, strict=True)):
                self._given[i] += n
                self._lacks[i] += share * ends * _ONE // period - n * _ONE
            at += ends
            if ended is not None:
                return at, ended
        return at, None

    def _made_up_for(self, shares: Sequence[int], length: int) -> list[int]:
        """How often each set is drawn in the next `length` draws, for what it lacks and what it should give then."""
        period = sum(shares)
        due = {i: share * length * _ONE // period + self._lacks[i] for i, share in enumerate(shares) if share}
        counts = [max(0, due.get(i, 0) // _ONE) for i in range(len(shares))]
        while rest := length - sum(counts):
            step = 1 if rest > 0 else -1
            able = (i for i in due if step > 0 or counts[i])
            for i in sorted(able, key=lambda i: step * (counts[i] * _ONE - due[i]))[: abs(rest)]:
                counts[i] += step
        return counts

    def _at(self, draw: int) -> tuple[_Piece, Blend]:
        """The piece of a draw."""
        at = bisect.bisect_right(self._firsts, draw) - 1
        known, blend = self._current
        if known != at:
            blend = self._pieces[at].blend()
            # One assignment: threads that read ahead may be in two pieces.
            self._current = (at, blend)
        return self._pieces[at], blend

    def __call__(self, draw: int) -> tuple[int, int]:
        """Set and its sample number of draw `draw`, from 0."""
        piece, blend = self._at(draw)
        member, number = blend(draw - piece.first)
        return member, piece.before[member] + number

    def counts(self, segment: Segment) -> list[int]:
        """How often each set is to be drawn in one period of a segment."""
        return self._counts[segment.first]

    def drawn(self, draws: int) -> list[int]:
        """How many samples each set gives in the first `draws` draws."""
        piece, blend = self._at(draws)
        return [sum(both) for both in zip(piece.before, blend.drawn(draws - piece.first), strict=True)]


def _end(piece: _Piece, length: int | None, limits: Sequence[int]) -> tuple[int | None, int | None]:
    """After how many draws of a piece of `length` a set would go beyond its limit, and which; (`length`, None) if none.

    The piece is tabulated only if there is one.
    """
    period = sum(piece.counts)
    left = [limit - before for limit, before in zip(limits, piece.before, strict=True)]
    beyond = [i for i, n in enumerate(piece.counts) if n and (length is None or n * length // period > left[i])]
    if not beyond:
        return length, None
    # Draw j of a set is no earlier than j / share and no later than (j + 1) / share.
    latest = min(-(-(left[i] + 1) * period // piece.counts[i]) for i in beyond)
    blend = piece.blend()
    return min((blend.draw_of(i, left[i]), i) for i in beyond if left[i] * period // piece.counts[i] <= latest)
