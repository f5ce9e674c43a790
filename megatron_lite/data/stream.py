"""The stream of samples a run consumes: sample k is arithmetic on the seed, the split and k.

Streams have no end: behind the last sample of an epoch follows the next epoch, in another order.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_lite.data.documents import Extent, WindowsOfDocuments
from megatron_lite.data.order import Permutation, keys, scramble
from megatron_lite.data.sample import Sample
from megatron_lite.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the seq_length + 1 tokens of a sample come from."""

    prefix: str | None
    """The token set; None for generated data."""
    epoch: int
    """How often that set, or the sets shuffled with it, were gone through before, wholly."""
    extents: list[Extent]


class SampleStream(Protocol):
    """Endless numbered samples: `stream[k]` is the same on whatever rank asks."""

    samples_per_epoch: int
    ends_after: int | None
    """Samples after which the data are exhausted and are not to be repeated; None if they go on for ever."""

    @property
    def fingerprint(self) -> str:
        """Differs when the data, their cutting or their order differ."""
        ...

    def __getitem__(self, sample: int) -> Sample: ...

    def origin(self, sample: int) -> Origin:
        """Where the tokens of a sample come from."""
        ...

    def describe(self) -> list[str]:
        """Lines for the log, derived numbers as sums."""
        ...

    def changes(self, first: int, stop: int) -> list[str]:
        """Lines for the log about what the samples `first` to `stop` changed: epochs that began, other weights."""
        ...

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the data hold a token id that the vocabulary has not."""
        ...


def fingerprint_of(*parts: object) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class ShuffledWindows:
    """The windows of one or more token sets, all of them once an epoch, in an order of each epoch's own."""

    ends_after = None

    def __init__(self, sets: Sequence[WindowsOfDocuments], *name: int | str):
        self._sets = sets
        self._ends = list(itertools.accumulate(len(windows) for windows in sets))
        self._name = name
        self._order = (0, Permutation(self._ends[-1], *name, 0))
        self.samples_per_epoch = self._ends[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self._name, [windows.identity for windows in self._sets])

    def __getitem__(self, sample: int) -> Sample:
        windows, window = self._window(*divmod(sample, self.samples_per_epoch))
        return windows[window]

    def origin(self, sample: int) -> Origin:
        epoch, at = divmod(sample, self.samples_per_epoch)
        windows, window = self._window(epoch, at)
        return Origin(windows.reader.prefix, epoch, windows.extents(window))

    def _window(self, epoch: int, at: int) -> tuple[WindowsOfDocuments, int]:
        """A token set and the number of its window."""
        ordered, order = self._order
        if ordered != epoch:
            order = Permutation(self.samples_per_epoch, *self._name, epoch)
            self._order = (epoch, order)
        window = order(at)
        member = bisect.bisect_right(self._ends, window)
        return self._sets[member], window - (self._ends[member - 1] if member else 0)

    @property
    def prefixes(self) -> str:
        """The names of the sets, for the log."""
        return ", ".join(windows.reader.prefix for windows in self._sets)

    def changes(self, first: int, stop: int) -> list[str]:
        epoch = (stop - 1) // self.samples_per_epoch
        if stop == first or epoch == (first - 1) // self.samples_per_epoch or not epoch:
            return []
        return [f"{self.prefixes}: epoch {epoch + 1} begins, after {epoch * self.samples_per_epoch:,} samples of it"]

    def describe(self) -> list[str]:
        lines = [windows.describe() for windows in self._sets]
        if len(lines) > 1:
            sizes = " + ".join(f"{len(windows):,}" for windows in self._sets)
            lines.append(f"an epoch is {self.samples_per_epoch:,} samples = {sizes}")
        return lines

    def check_vocabulary(self, vocab_size: int) -> None:
        for windows in self._sets:
            windows.check_vocabulary(vocab_size)


class MockStream:
    """Generated samples a model can learn: each token is 1 to 4 above the one before, modulo 256.

    The four are equally likely, so the loss falls to ln 4 = 1.386 nats and no further. Documents, about eight to a
    sample, run on where one ends.
    """

    samples_per_epoch = 1 << 16
    ends_after = None
    _STEPS = 4

    def __init__(self, seq_length: int, vocab_size: int, *name: int | str):
        self._seq_length = seq_length
        self._modulus = min(vocab_size, 256)
        self._document = max(2, seq_length // 8)
        self._keys = keys(3, "mock", *name)
        self._positions = np.arange(seq_length + 1, dtype=np.uint64)
        self.fingerprint = fingerprint_of("mock", name, seq_length, self._modulus)

    def __getitem__(self, sample: int) -> Sample:
        low, high, of_position = self._keys
        own = scramble(scramble(sample & 0xFFFFFFFF, low) ^ (sample >> 32), high)
        drawn = scramble(scramble(self._positions, of_position), own)
        tokens = ((own + np.cumsum(1 + drawn % self._STEPS)) % self._modulus).astype(np.int64)
        begins = drawn // self._STEPS % self._document == 0
        begins[0] = True
        return Sample(tokens, np.flatnonzero(begins))

    def origin(self, sample: int) -> Origin:
        return Origin(None, sample // self.samples_per_epoch, [])

    def changes(self, first: int, stop: int) -> list[str]:
        return []

    def describe(self) -> list[str]:
        return [
            f"mock data: {self.samples_per_epoch:,} samples of {self._seq_length:,} tokens an epoch, token ids 0 to "
            f"{self._modulus - 1}; the loss can fall to ln {self._STEPS} = {math.log(self._STEPS):.3f}"
        ]

    def check_vocabulary(self, vocab_size: int) -> None:
        if vocab_size < self._modulus:
            raise DataError(f"mock data hold token ids to {self._modulus - 1} and the vocabulary has {vocab_size} ids.")


class SkippingStream:
    """A stream some ranges of which are left out, as after a loss spike; k counts what is consumed."""

    def __init__(self, stream: SampleStream, ranges: Sequence[tuple[int, int]]):
        self._stream = stream
        self._ranges = ranges
        self.samples_per_epoch = stream.samples_per_epoch

    @property
    def ends_after(self) -> int | None:
        if (end := self._stream.ends_after) is None:
            return None
        return end - sum(max(0, min(stop, end) - first) for first, stop in self._ranges)

    @property
    def fingerprint(self) -> str:
        """The stream's own: a range added on resume does not make it other data."""
        return self._stream.fingerprint

    def __getitem__(self, sample: int) -> Sample:
        return self._stream[stream_position(sample, self._ranges)]

    def origin(self, sample: int) -> Origin:
        return self._stream.origin(stream_position(sample, self._ranges))

    def changes(self, first: int, stop: int) -> list[str]:
        if first == stop:
            return []
        begin, last = stream_position(first, self._ranges), stream_position(stop - 1, self._ranges)
        return self._stream.changes(begin, last + 1)

    def describe(self) -> list[str]:
        skipped = [f"samples {first:,} to {stop - 1:,} are left out" for first, stop in self._ranges]
        return self._stream.describe() + skipped

    def check_vocabulary(self, vocab_size: int) -> None:
        self._stream.check_vocabulary(vocab_size)


def parse_skip_ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The ranges "A:B" as sorted (A, B) without overlap; sample B is not left out.

    Raises ConfigError unless 0 <= A < B.
    """
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(map(_parse_range, texts)):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return tuple(merged)


def _parse_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text.replace("_", "").strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"skip_samples={text} is no range of sample numbers A:B with A below B; "
            "1000:1200 leaves out samples 1000 to 1199."
        )
    return int(match[1]), int(match[2])


def stream_position(consumed: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Number in the stream of the sample consumed after `consumed` others, `ranges` being left out."""
    position = consumed
    for first, stop in ranges:
        if position < first:
            break
        position += stop - first
    return position
