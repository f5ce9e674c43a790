"""The stage that leaves one of nearly equal documents: MinHash signatures, cut into bands (MinHash-LSH)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.spill import parted, runs, temporary_folder
from megatron_lite.data.refine.stage import DROPPED, KEPT, CorpusStage
from megatron_lite.data.refine.words import grams, mixed

_RECORD_BYTES = 2 * 8
_AT_ONCE = 1 << 15
"""Hashes of a chunk of shingles that are in the processor's cache together."""
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class NearDuplicates(CorpusStage):
    """Keeps the first of each cluster of documents that share most of their word n-grams.

    Two documents of Jaccard similarity s are joined with probability 1 - (1 - s^rows)^bands; clusters are what is
    connected by such pairs. The defaults are FineWeb's (Penedo et al. 2024), half of pairs at s = 0.69. Case, accents,
    digits and signs make no difference. Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3.
    """

    name: ClassVar[str] = "near_duplicates"
    edits: ClassVar[bool] = False
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    @property
    def keys(self) -> int:
        return self.bands

    def problems(self) -> Iterator[str]:
        for name in ("ngram", "bands", "rows"):
            if getattr(self, name) < 1:
                yield f"{name} {getattr(self, name)} is below 1; FineWeb has ngram 5, bands 14, rows 8."

    def signature(self, document: Document) -> np.ndarray | None:
        """uint32 [bands, rows]: the least of each of bands x rows hashes over the n-grams; None without n-grams."""
        shingles = np.unique(grams(document.normal_hashes, self.ngram) >> np.uint64(32))
        if not len(shingles):
            return None
        multipliers, offsets = self._hashes
        least = np.full(len(multipliers), np.iinfo(np.uint64).max, np.uint64)
        at_once = max(1, _AT_ONCE // len(multipliers))
        with np.errstate(over="ignore"):
            for start in range(0, len(shingles), at_once):
                hashes = multipliers[:, None] * shingles[start : start + at_once]
                hashes += offsets[:, None]
                np.minimum(least, hashes.min(axis=1), out=least)
        return (least >> np.uint64(32)).astype(np.uint32).reshape(self.bands, self.rows)

    @functools.cached_property
    def _hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Multiply-and-shift hashing of 32-bit values (Dietzfelbinger 1996): the high half of a x + b mod 2^64."""
        count = self.bands * self.rows
        with np.errstate(over="ignore"):
            numbers = mixed((np.arange(2 * count, dtype=np.uint64) + np.uint64(self.seed << 32)) * np.uint64(_GOLDEN))
        return numbers[:count] | np.uint64(1), numbers[count:]

    def sign(self, document: Document) -> np.ndarray:
        signature = self.signature(document)
        if signature is None:
            return np.zeros((1, self.bands), np.uint64)
        keys = np.zeros(self.bands, np.uint64)
        with np.errstate(over="ignore"):
            for column in signature.T.astype(np.uint64):
                keys = mixed(keys * np.uint64(_GOLDEN) + column + np.uint64(1))
        return keys[None]

    def resolve(
        self, units: Sequence[Callable[[], np.ndarray]], verdicts: np.ndarray, folder: Path, memory: int
    ) -> None:
        with temporary_folder(folder) as inside:
            roots = np.memmap(inside / "roots", np.int64, "w+", shape=len(verdicts))
            roots[:] = np.arange(len(verdicts))
            for band in range(self.bands):
                self._join(self._records(units, verdicts, band), roots, inside, memory)
            for start in range(0, len(roots), _AT_ONCE):
                chunk = roots[start : start + _AT_ONCE]
                verdicts[start : start + len(chunk)][chunk != np.arange(start, start + len(chunk))] = DROPPED

    def _records(
        self, units: Sequence[Callable[[], np.ndarray]], verdicts: np.ndarray, band: int
    ) -> Iterator[np.ndarray]:
        start = 0
        for load in units:
            keys = load()[:, band]
            wanted = (verdicts[start : start + len(keys)] == KEPT) & (keys != 0)
            rows = np.arange(start, start + len(keys), dtype=np.uint64)
            yield np.column_stack([keys, rows])[wanted]
            start += len(keys)

    def _join(self, records: Iterator[np.ndarray], roots: np.ndarray, folder: Path, memory: int) -> None:
        """Join documents of equal keys; the root of a cluster is its first document, whatever the order of joining."""
        for block in parted(records, len(roots) * _RECORD_BYTES, folder, memory):
            order, starts = runs(block[:, :1])
            lengths = np.diff(np.append(starts, len(order)))
            several = lengths > 1
            for first, length in zip(starts[several].tolist(), lengths[several].tolist(), strict=True):
                documents = block[order[first : first + length], 1].tolist()
                for other in documents[1:]:
                    _unite(roots, documents[0], other)

    def apply(self, document: Document, verdicts: np.ndarray) -> Drop | None:
        return Drop("near duplicate") if verdicts[0] == DROPPED else None


def _root(roots: np.ndarray, document: int) -> int:
    while (above := int(roots[document])) != document:
        roots[document] = roots[above]
        document = above
    return document


def _unite(roots: np.ndarray, one: int, other: int) -> None:
    one, other = sorted((_root(roots, one), _root(roots, other)))
    roots[other] = one
