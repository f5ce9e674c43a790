"""Samples made of whole documents, chosen so that they fill the sample up: best-fit packing."""

from __future__ import annotations

import bisect
from fractions import Fraction

import numpy as np

from megatron_lite.data.documents import Extent, WindowsOfDocuments
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.sample import Sample
from megatron_lite.errors import DataError
from megatron_lite.kernels import host

_MOST_DOCUMENTS = 2**31 - 1
_CHUNK = 1 << 20


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items share a bin: int32 [items] of all bins one after another, and int32 [bins + 1], where each begins.

    Items, int32 sizes from 1 to `capacity`, go from the largest to the smallest into the bin that they
    leave the least room in, of equal ones the one filled last: best-fit decreasing. Within a bin they
    ascend. csrc/host/best_fit.h does the same and is used where it is compiled.
    """
    if (compiled := host.module()) is not None:
        return compiled.best_fit(sizes, capacity)
    rooms: list[int] = []
    bins_with: dict[int, list[int]] = {}
    bin_of = np.empty(len(sizes), np.int32)
    num_bins = 0
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            bin, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[at]
            bin = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[at]
        bin_of[item] = bin
        if left := room - size:
            stack = bins_with.setdefault(left, [])
            if not stack:
                bisect.insort(rooms, left)
            stack.append(bin)
    starts = np.concatenate(([0], np.cumsum(np.bincount(bin_of, minlength=num_bins)))).astype(np.int32)
    return np.argsort(bin_of, kind="stable").astype(np.int32), starts


class PackedDocuments(WindowsOfDocuments):
    """The samples of some whole documents, none cut that fits into `seq_length` + 1 tokens.

    A longer one is cut into pieces of that many tokens, each beginning with the last token of the one
    before, so that every token but a document's first is a target once; what is left over is packed like a
    document. What stays empty is filled with token 0, a document of its own that does not count, no more
    than a document's first token does. Documents of one token have nothing to predict and are left out.

    Which share a sample is decided when the set is opened and is the same in every epoch: 0.1 s and 8
    bytes of memory for a million documents. Ding et al. 2024, "Fewer truncations improve language modeling".
    """

    def __init__(
        self,
        reader: IndexedReader,
        seq_length: int,
        documents: tuple[int, int] | None = None,
        mask: IndexedReader | None = None,
    ):
        super().__init__(reader, seq_length, documents, mask)
        first, last = self.documents
        if last - first > _MOST_DOCUMENTS:
            raise DataError(
                f"{reader.prefix} gives {last - first:,} documents to be packed; {_MOST_DOCUMENTS:,} are possible: "
                "divide the set, or leave out data_packing."
            )
        tails, sizes, cut, pieces = [], [], [], []
        for at in range(first, last, _CHUNK):
            stop = min(at + _CHUNK, last)
            whole, rest = np.divmod(np.diff(reader.document_tokens(at, stop)) - 1, seq_length)
            tails.append(np.flatnonzero((whole >= 0) & (rest > 0)) + (at - first))
            sizes.append(rest[tails[-1] - (at - first)] + 1)
            cut.append(np.flatnonzero(whole > 0) + (at - first))
            pieces.append(whole[cut[-1] - (at - first)])
        tail_of_item = _joined(tails, np.int32)
        sizes_of_items = _joined(sizes, np.int32)
        items, self._starts = best_fit(sizes_of_items, seq_length + 1)
        self._tails = tail_of_item[items]
        self._cut = _joined(cut, np.int32)
        self._ends_of_cut = np.cumsum(_joined(pieces, np.int64))
        self._num_bins = len(self._starts) - 1
        self._num_pieces = int(self._ends_of_cut[-1]) if len(self._cut) else 0
        filled = int(sizes_of_items.sum(dtype=np.int64)) + self._num_pieces * (seq_length + 1)
        self._filled = filled / max(1, len(self) * (seq_length + 1))

    @property
    def identity(self) -> list:
        return [*super().identity, "best_fit"]

    @property
    def targets(self) -> Fraction:
        """Tokens that a sample trains on, on average, loss masks aside."""
        first, last = self.documents
        documents = sum(
            int(np.count_nonzero(np.diff(self.reader.document_tokens(at, min(at + _CHUNK, last)))))
            for at in range(first, last, _CHUNK)
        )
        return Fraction(self.num_tokens - documents, len(self))

    def __len__(self) -> int:
        return self._num_bins + self._num_pieces

    def _pieces(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64: the document, the first token in the flat stream, and the tokens of each piece of a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        first = self.documents[0]
        if sample >= self._num_bins:
            piece = sample - self._num_bins
            at = int(np.searchsorted(self._ends_of_cut, piece, side="right"))
            number = piece - (int(self._ends_of_cut[at - 1]) if at else 0)
            document = first + int(self._cut[at])
            position = self.reader.document_token(document) + number * self.seq_length
            return np.array([document]), np.array([position]), np.array([self.seq_length + 1])
        documents = first + self._tails[self._starts[sample] : self._starts[sample + 1]].astype(np.int64)
        begins, ends = self.reader.document_bounds(documents)
        sizes = (ends - begins - 1) % self.seq_length + 1
        return documents, ends - sizes, sizes

    def __getitem__(self, sample: int) -> Sample:
        _, positions, sizes = self._pieces(sample)
        starts = np.concatenate(([0], sizes.cumsum()))
        filled = int(starts[-1])
        tokens = np.zeros(self.seq_length + 1, self.reader.dtype)
        tokens[:filled] = self.reader.stretches(positions, sizes)
        counts = np.zeros(self.seq_length + 1, bool)
        counts[:filled] = True if self.mask is None else self.mask.stretches(positions, sizes)
        starts = starts[: len(starts) - (filled > self.seq_length)]
        counts[starts] = False
        return Sample(tokens, starts, counts)

    def extents(self, sample: int) -> list[Extent]:
        """The stretches of documents that a sample is made of, in order."""
        documents, positions, sizes = self._pieces(sample)
        firsts = positions - self.reader.document_bounds(documents)[0]
        return list(map(Extent, documents.tolist(), firsts.tolist(), sizes.tolist()))

    def describe(self) -> str:
        return (
            f"{super().describe()}packed samples of {self.seq_length:,}, {self._filled:.2%} filled; {len(self._cut):,} "
            f"documents are longer and cut"
        )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
