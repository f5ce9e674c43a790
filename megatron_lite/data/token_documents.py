"""Documents as tokens on their way from one place to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

CHUNK_TOKENS = 1 << 20
"""About what is held at a time."""


@dataclasses.dataclass(frozen=True)
class TokenDocuments:
    """Some documents of one sequence each: ids end to end, int64 [D] lengths, float32 [D] scores."""

    ids: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def joined_pieces(flat: np.ndarray, ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Pieces of a flat array end to end, each given by its end there and its length."""
    pieces = [flat[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else flat[:0]


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: the places start, start + 1, ... of stretches of those lengths, one stretch after another."""
    ends = lengths.cumsum()
    return (starts - ends + lengths).repeat(lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def in_chunks(lengths: np.ndarray, size: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Runs of documents of about `size` tokens together: those that end within the same multiple of it."""
    if not len(lengths):
        return
    number = np.cumsum(lengths) // size
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True):
        yield slice(start, stop)
