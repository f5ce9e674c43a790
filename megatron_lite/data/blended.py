"""Several streams drawn from in proportion to weights, which may change on the way."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from megatron_lite.data.sample import Sample
from megatron_lite.data.segments import Segment, SegmentedBlend
from megatron_lite.data.stream import Origin, ShuffledWindows, fingerprint_of

_LISTED = 12
"""Sets that a line of the log tells of."""
_CHANGES = 6
"""Changes of the weights that are told of beforehand."""


class BlendedStream:
    """Several streams drawn from in proportion to their weights, to within one sample at any moment.

    Each goes through its own epochs. An epoch of the blend is as many draws as they hold samples together.
    `total_samples`, the length of the run where it is known, is told of in the log.
    """

    def __init__(self, members: Sequence[ShuffledWindows], blend: SegmentedBlend, total_samples: int | None = None):
        self._members = members
        self._blend = blend
        self.ends_after = blend.ends_after
        self._end = min((length for length in (total_samples, self.ends_after) if length is not None), default=None)
        self.samples_per_epoch = sum(member.samples_per_epoch for member in members)

    @functools.cached_property
    def fingerprint(self) -> str:
        counts = [[segment.first, *self._blend.counts(segment)] for segment in self._blend.segments]
        return fingerprint_of(counts, [member.fingerprint for member in self._members])

    def __getitem__(self, sample: int) -> Sample:
        member, number = self._blend(sample)
        return self._members[member][number]

    def origin(self, sample: int) -> Origin:
        """Where the tokens of a sample come from."""
        member, number = self._blend(sample)
        return self._members[member].origin(number)

    def changes(self, first: int, stop: int) -> list[str]:
        """Lines for the log about what the samples `first` to `stop` changed: epochs that began, other weights."""
        begun = [segment for segment in self._blend.segments[1:] if first <= segment.first < stop]
        lines = [self._line(segment) for segment in begun[-1:]]
        drawn = zip(self._members, self._blend.drawn(first), self._blend.drawn(stop), strict=True)
        return [*lines, *(line for member, before, after in drawn for line in member.changes(before, after))]

    def describe(self) -> list[str]:
        """Lines for the log, derived numbers as sums."""
        segments = self._blend.segments
        counts = self._blend.counts(segments[0])
        lines = [
            f"{count / sum(counts):.4%} = {count:,} of {sum(counts):,} draws from {line}"
            for count, member in zip(counts, self._members, strict=True)
            for line in member.describe()
        ]
        coming = [segment for segment in segments[1:] if self._end is None or segment.first < self._end]
        shown = coming if len(coming) <= _CHANGES else [*coming[: _CHANGES - 1], coming[-1]]
        lines += map(self._line, shown)
        if len(shown) < len(coming):
            lines.append(f"these are {len(shown)} of {len(coming):,} changes of the weights")
        return [*lines, *self._coverage()]

    def _coverage(self) -> Iterator[str]:
        """How often each set is gone through in the run."""
        if self._end is None:
            return
        for member, drawn in zip(self._members, self._blend.drawn(self._end), strict=True):
            yield (
                f"{member.prefixes} is gone through {drawn / member.samples_per_epoch:.2f} times in {self._end:,} "
                f"samples = {drawn:,} of {member.samples_per_epoch:,}"
            )

    def _line(self, segment: Segment) -> str:
        counts = self._blend.counts(segment)
        drawn = [
            f"{count / sum(counts):.2%} {member.prefixes}"
            for count, member in zip(counts, self._members, strict=True)
            if count
        ]
        more = f" and {len(drawn) - _LISTED} more" if len(drawn) > _LISTED else ""
        why = ""
        if segment.exhausted is not None:
            why = f"{self._members[segment.exhausted].prefixes} is exhausted, its share goes to the others: "
        return f"from sample {segment.first:,} on {why}{', '.join(drawn[:_LISTED])}{more}"

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the data hold a token id that the vocabulary has not."""
        for member in self._members:
            member.check_vocabulary(vocab_size)
