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

from megatron_lite import log
from megatron_lite.config.data import DataConfig
from megatron_lite.data.blend import Blend
from megatron_lite.data.data_path import parse_data_path
from megatron_lite.data.documents import Extent, TokenWindows, parse_split, split_documents
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.order import Permutation, keys, scramble
from megatron_lite.data.provenance import check_tokenizer, read_provenance
from megatron_lite.data.sample import Sample
from megatron_lite.data.tokenizer_interface import Tokenizer
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

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the data hold a token id that the vocabulary has not."""
        ...


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class ShuffledWindows:
    """The windows of one or more token sets, all of them once an epoch, in an order of each epoch's own."""

    def __init__(self, sets: Sequence[TokenWindows], *name: int | str):
        self._sets = sets
        self._ends = list(itertools.accumulate(len(windows) for windows in sets))
        self._name = name
        self._order = (0, Permutation(self._ends[-1], *name, 0))
        self.samples_per_epoch = self._ends[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        return _fingerprint(
            self._name, [(s.reader.fingerprint, s.documents, s.seq_length, s.stride) for s in self._sets]
        )

    def __getitem__(self, sample: int) -> Sample:
        windows, window = self._window(*divmod(sample, self.samples_per_epoch))
        return windows[window]

    def origin(self, sample: int) -> Origin:
        epoch, at = divmod(sample, self.samples_per_epoch)
        windows, window = self._window(epoch, at)
        return Origin(windows.reader.prefix, epoch, windows.extents(window))

    def _window(self, epoch: int, at: int) -> tuple[TokenWindows, int]:
        """A token set and the number of its window."""
        ordered, order = self._order
        if ordered != epoch:
            order = Permutation(self.samples_per_epoch, *self._name, epoch)
            self._order = (epoch, order)
        window = order(at)
        member = bisect.bisect_right(self._ends, window)
        return self._sets[member], window - (self._ends[member - 1] if member else 0)

    def describe(self) -> list[str]:
        lines = [windows.describe() for windows in self._sets]
        if len(lines) > 1:
            sizes = " + ".join(f"{len(windows):,}" for windows in self._sets)
            lines.append(f"an epoch is {self.samples_per_epoch:,} samples = {sizes}")
        return lines

    def check_vocabulary(self, vocab_size: int) -> None:
        for windows in self._sets:
            windows.check_vocabulary(vocab_size)


class BlendedStream:
    """Several streams drawn from in proportion to their weights, to within one sample at any moment.

    Each goes through its own epochs. An epoch of the blend is as many draws as they hold samples together.
    """

    def __init__(self, members: Sequence[SampleStream], blend: Blend):
        self._members = members
        self._blend = blend
        self.samples_per_epoch = sum(member.samples_per_epoch for member in members)

    @functools.cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._blend.counts, [member.fingerprint for member in self._members])

    def __getitem__(self, sample: int) -> Sample:
        member, number = self._blend(sample)
        return self._members[member][number]

    def origin(self, sample: int) -> Origin:
        member, number = self._blend(sample)
        return self._members[member].origin(number)

    def describe(self) -> list[str]:
        period = self._blend.period
        return [
            f"{count / period:.4%} = {count:,} of {period:,} draws from {line}"
            for count, member in zip(self._blend.counts, self._members, strict=True)
            for line in member.describe()
        ]

    def check_vocabulary(self, vocab_size: int) -> None:
        for member in self._members:
            member.check_vocabulary(vocab_size)


class MockStream:
    """Generated samples a model can learn: each token is 1 to 4 above the one before, modulo 256.

    The four are equally likely, so the loss falls to ln 4 = 1.386 nats and no further. Documents, about eight to a
    sample, run on where one ends.
    """

    samples_per_epoch = 1 << 16
    _STEPS = 4

    def __init__(self, seq_length: int, vocab_size: int, *name: int | str):
        self._seq_length = seq_length
        self._modulus = min(vocab_size, 256)
        self._document = max(2, seq_length // 8)
        self._keys = keys(3, "mock", *name)
        self._positions = np.arange(seq_length + 1, dtype=np.uint64)
        self.fingerprint = _fingerprint("mock", name, seq_length, self._modulus)

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
    def fingerprint(self) -> str:
        """The stream's own: a range added on resume does not make it other data."""
        return self._stream.fingerprint

    def __getitem__(self, sample: int) -> Sample:
        return self._stream[stream_position(sample, self._ranges)]

    def origin(self, sample: int) -> Origin:
        return self._stream.origin(stream_position(sample, self._ranges))

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


def build_stream(
    data: DataConfig,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    skip_samples: Sequence[str] = (),
) -> SampleStream:
    """The stream of "train", "valid" or "test" samples a configuration asks for.

    Several prefixes without weights are shuffled together; with weights they are blended. Raises
    DataError for a damaged set, one made with another tokenizer than `tokenizer`, an empty split and a set
    shorter than one sequence; ConfigError for a path, split or range that cannot be read.
    """
    if data.mock_data:
        stream: SampleStream = MockStream(data.seq_length, vocab_size, seed, split)
    else:
        stream = _file_stream(data, seed, split, tokenizer)
    ranges = parse_skip_ranges(skip_samples)
    return SkippingStream(stream, ranges) if ranges else stream


def _file_stream(data: DataConfig, seed: int, split: str, tokenizer: Tokenizer | None) -> SampleStream:
    own_path = {"train": data.train_data_path, "valid": data.valid_data_path, "test": data.test_data_path}[split]
    entries = own_path or data.data_path
    if not entries:
        raise DataError(f"no data for {split}: give --data-path or --{split}-data-path.")
    parsed = parse_data_path(entries)
    prefixes = [prefix for entry in parsed for prefix in entry.prefixes]
    weights = None if parsed[0].weight is None else [entry.weight for entry in parsed]
    shares = None if own_path else parse_split(data.split)
    sets = []
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        check_tokenizer(prefix, read_provenance(prefix, reader.num_tokens), tokenizer)
        documents = shares and split_documents(reader.num_documents, shares, split)
        sets.append(TokenWindows(reader, data.seq_length, data.sample_stride, documents))
    if weights is not None:
        for windows in sets:
            if not len(windows):
                raise _no_sample(windows, split)
        members = [ShuffledWindows([windows], "order", seed, split, i) for i, windows in enumerate(sets)]
        return members[0] if len(members) == 1 else BlendedStream(members, Blend(weights))
    filled = [windows for windows in sets if len(windows)]
    if not filled:
        raise _no_sample(sets[0], split)
    for windows in sets:
        if not len(windows):
            log.warn(f"{windows.describe()}: too short for one {split} sample, it is left out")
    return ShuffledWindows(filled, "order", seed, split, 0)


def _no_sample(windows: TokenWindows, split: str) -> DataError:
    first, last = windows.documents
    way_out = "; to train without validation, set eval_interval to 0" if split == "valid" else ""
    return DataError(
        f"{windows.reader.prefix} holds no {split} sample: {split} gets {last - first:,} of its "
        f"{windows.reader.num_documents:,} documents, with {windows.num_tokens:,} tokens, and one sample is seq_length "
        f"+ 1 = {windows.seq_length + 1:,}. Add documents, give {split} a larger share in split, or shorten "
        f"seq_length{way_out}."
    )
