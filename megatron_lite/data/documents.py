"""Windows over the documents of a token set, and which documents train, validate and test."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import re
from fractions import Fraction

import numpy as np

from megatron_lite import log
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import read_provenance
from megatron_lite.data.sample import Sample
from megatron_lite.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
_SCAN_BLOCK = 1 << 16
_SCAN_BLOCKS = 1 << 3


def parse_split(text: str) -> tuple[float, float, float]:
    """The shares of train, validation and test that "969,30,1" stands for; they add up to 1.

    Raises ConfigError for anything but one to three numbers, none negative, not all zero.
    """
    try:
        weights = [float(part) for part in re.split("[,/]", text)]
    except ValueError:
        weights = []
    total = sum(weights)
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < total < math.inf:
        raise ConfigError(
            f'split="{text}" is not one to three weights of train, validation and test; write for example "969,30,1".'
        )
    train, valid, test = (weight / total for weight in (*weights, 0.0, 0.0)[:3])
    return train, valid, test


def split_documents(num_documents: int, shares: tuple[float, float, float], split: str) -> tuple[int, int]:
    """First document of a split and the one behind its last, rounded as Megatron rounds."""
    bounds = [round(share * num_documents) for share in itertools.accumulate(shares, initial=0.0)]
    at = SPLITS.index(split)
    return bounds[at], bounds[at + 1]


@dataclasses.dataclass(frozen=True)
class Extent:
    """A stretch of one document: `tokens` of them from its token `first` on."""

    document: int
    first: int
    tokens: int


class WindowsOfDocuments(abc.ABC):
    """The samples of some whole documents of a token set, numbered; there may be none, `len()` is 0.

    `mask`, a set of as many tokens, is 0 where a token is no target.
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        documents: tuple[int, int] | None = None,
        mask: IndexedReader | None = None,
    ):
        self.reader = reader
        self.mask = mask
        self.seq_length = seq_length
        self.documents = documents or (0, reader.num_documents)
        self.first_token, self.last_token = (reader.document_token(document) for document in self.documents)
        self.num_tokens = self.last_token - self.first_token

    @property
    def identity(self) -> list:
        """What differs, JSON-able, where samples differ."""
        return [
            self.reader.fingerprint,
            self.documents,
            self.seq_length,
            *([self.mask.fingerprint] if self.mask else []),
        ]

    @property
    @abc.abstractmethod
    def targets(self) -> Fraction:
        """Tokens that a sample trains on, on average, loss masks aside."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, number: int) -> Sample: ...

    @abc.abstractmethod
    def extents(self, number: int) -> list[Extent]:
        """The stretches of documents that a sample is made of, in order; empty documents are left out."""

    def describe(self) -> str:
        """A line for the log."""
        first, last = self.documents
        masked = " with a loss mask" if self.mask else ""
        return (
            f"{self.reader.prefix}{masked}: documents {first:,} to {last:,} of {self.reader.num_documents:,}, "
            f"{self.num_tokens:,} tokens = {len(self):,} "
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the documents hold a token id that the vocabulary has not.

        The manifest of a set says what its ids were checked against as they were written. Of one without, up to 2^19
        tokens are all read; of a larger one as many, in blocks spread evenly, which is said: hundreds of sets are to
        be open within a second, and every sample is checked when it is read.
        """
        if np.iinfo(self.reader.dtype).max < vocab_size and self.reader.dtype.kind == "u":
            return
        facts = read_provenance(self.reader.prefix, self.reader.num_tokens)
        if facts is not None and facts.vocab_size <= vocab_size:
            return
        num_blocks = -(-self.num_tokens // _SCAN_BLOCK)
        if num_blocks > _SCAN_BLOCKS:
            log.once(
                f"of each large token set whose manifest does not tell, {_SCAN_BLOCKS * _SCAN_BLOCK:,} tokens are "
                "checked against the vocabulary now, the others as they are read"
            )
        chosen = min(num_blocks, _SCAN_BLOCKS)
        largest = 0
        for i in range(chosen):
            start = self.first_token + i * num_blocks // chosen * _SCAN_BLOCK
            largest = max(largest, self.reader.max_token_id(start, min(start + _SCAN_BLOCK, self.last_token)))
        self.reader.release()
        if largest >= vocab_size:
            negative = largest > np.iinfo(self.reader.dtype).max
            raise DataError(
                f"{self.reader.prefix} holds {'a negative token id' if negative else f'token id {largest:,}'} and the "
                f"vocabulary has ids 0 to {vocab_size - 1:,}: it was made with another tokenizer. Give that tokenizer, "
                "or preprocess the text again with this one."
            )


class TokenWindows(WindowsOfDocuments):
    """Windows of `seq_length` + 1 tokens, `stride` apart.

    Documents run into one another, as in Megatron: what parts them is the end-of-document token written
    by preprocessing. Window p is tokens p * stride to p * stride + seq_length + 1 of the documents, in the
    file's dtype, the last token of it only a target. The windows are the same in every epoch, and up to `stride` tokens
    at the end that no longer fill a window are left out.
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        stride: int | None = None,
        documents: tuple[int, int] | None = None,
        mask: IndexedReader | None = None,
    ):
        super().__init__(reader, seq_length, documents, mask)
        self.stride = stride or seq_length
        self._count = max(0, (self.num_tokens - 1 - seq_length) // self.stride + 1)

    @property
    def identity(self) -> list:
        return [*super().identity, self.stride]

    @property
    def targets(self) -> Fraction:
        return Fraction(self.seq_length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, window: int) -> Sample:
        if not 0 <= window < self._count:
            raise IndexError(f"window {window} of {self._count}")
        start = self.first_token + window * self.stride
        stop = start + self.seq_length + 1
        counts = None if self.mask is None else self.mask.tokens(start, stop) != 0
        return Sample(self.reader.tokens(start, stop), self.reader.document_starts(start, stop), counts)

    def extents(self, window: int) -> list[Extent]:
        start = self.first_token + window * self.stride
        stop = start + self.seq_length + 1
        found = []
        document = self.reader.document_at(start)
        while start < stop:
            first, end = self.reader.document_token(document), self.reader.document_token(document + 1)
            if end > start:
                found.append(Extent(document, start - first, min(end, stop) - start))
                start = min(end, stop)
            document += 1
        return found

    def describe(self) -> str:
        overlap = f", stride {self.stride:,}" if self.stride != self.seq_length else ""
        return f"{super().describe()}samples of {self.seq_length:,}{overlap}"
