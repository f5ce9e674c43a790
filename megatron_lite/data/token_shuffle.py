"""Documents in a shuffled order, in bounded memory.

Document k gets a key, the k-th number of a keyed permutation of 0 ... 2^63 - 1, and documents are put in the order of
their keys: it follows from the seed and their order before. They are divided by key over as many files as make each fit
in memory, which are sorted one after another.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_lite.data.order import Permutation
from megatron_lite.data.token_documents import TokenDocuments, in_chunks, joined_pieces

_KEYS = 1 << 63
_HEAD = np.dtype([("key", "<i8"), ("length", "<i4"), ("score", "<f4")])
_HELD_SHARE = 4
_PART_SHARE = 2


def shuffled(
    batches: Iterable[TokenDocuments], seed: int, size: int, memory: int, folder: Path
) -> Iterator[TokenDocuments]:
    """The documents of all batches in the order that `seed` gives.

    `size` is about the bytes of their ids, `memory` those that may be held; more than that is written to `folder`. The
    order does not depend on how documents are divided into batches, on memory, or on what they hold.
    """
    keys = Permutation(_KEYS, "documents", seed)
    parts = _Parts(max(1, -(-size * _PART_SHARE // memory)), memory // _HELD_SHARE, folder)
    first = 0
    for batch in batches:
        parts.add(keys(np.arange(first, first + len(batch))), batch)
        first += len(batch)
    yield from parts.sorted()


class _Parts:
    """Documents divided by key: held in memory where there is one part, written to a pair of files for each if not."""

    def __init__(self, count: int, most_held: int, folder: Path):
        self._count, self._most, self._folder = count, most_held, folder
        self._held: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]
        self._bytes = 0
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed

    def add(self, keys: np.ndarray, batch: TokenDocuments) -> None:
        """Take in the documents of those keys."""
        self._dtype = batch.ids.dtype
        heads = np.empty(len(batch), _HEAD)
        heads["key"], heads["length"], heads["score"] = keys, batch.lengths, batch.scores
        # The high bits of the key, times the number of parts: a part has smaller keys than the next.
        part = ((keys >> 31) * self._count) >> 32
        order = np.argsort(part, kind="stable")
        ids = joined_pieces(batch.ids, np.cumsum(batch.lengths)[order], batch.lengths[order])
        heads = heads[order]
        bounds = np.searchsorted(part[order], np.arange(self._count + 1))
        tokens = np.concatenate([[0], np.cumsum(batch.lengths[order])])[bounds]
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            documents, of_ids = slice(*bounds[number : number + 2]), slice(*tokens[number : number + 2])
            self._held[number].append((heads[documents], ids[of_ids]))
        self._bytes += heads.nbytes + ids.nbytes
        if self._count > 1 and self._bytes > self._most:
            self._write()

    def _write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        for number, held in enumerate(self._held):
            for path, arrays in zip(self._paths(number), zip(*held, strict=True), strict=False):
                with open(path, "ab") as file:
                    file.writelines(memoryview(array).cast("B") for array in arrays if len(array))
            held.clear()
        self._bytes = 0

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self._folder / f"{number:06d}.heads", self._folder / f"{number:06d}.ids"

    def sorted(self) -> Iterator[TokenDocuments]:
        """All documents by key; they are gone then."""
        if self._count > 1:
            self._write()
        for number in range(self._count):
            for heads, ids in self._loaded(number):
                order = np.argsort(heads["key"])
                lengths = heads["length"].astype(np.int64)
                ends, lengths, scores = np.cumsum(lengths)[order], lengths[order], heads["score"][order]
                for some in in_chunks(lengths):
                    yield TokenDocuments(joined_pieces(ids, ends[some], lengths[some]), lengths[some], scores[some])

    def _loaded(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The heads and ids of a part, if it has any."""
        if held := self._held[number]:
            yield tuple(map(np.concatenate, zip(*held, strict=True)))
            held.clear()
        paths = self._paths(number)
        if self._count > 1 and paths[0].exists():
            yield np.fromfile(paths[0], _HEAD), np.fromfile(paths[1], self._dtype)
            for path in paths:
                path.unlink()
