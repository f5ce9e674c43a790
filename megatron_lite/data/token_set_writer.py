"""A token set in the making, with a score for each document if wanted, and its facts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.indexed import IndexedWriter, paths
from megatron_lite.data.loss_mask import mask_prefix
from megatron_lite.data.provenance import Provenance, manifest_path, scores_path, write_provenance
from megatron_lite.errors import DataError
from megatron_lite.publish import published
from megatron_lite.version import __version__


class TokenSetWriter:
    """The documents of a token set as they come."""

    def __init__(
        self, writer: IndexedWriter, scores: np.ndarray | None, counts: IdCounts | None, within: Path | None = None
    ):
        self._writer, self._scores, self._counts, self._within = writer, scores, counts, within
        self.dtype = writer.dtype

    def add(
        self, ids: np.ndarray, sequence_lengths: np.ndarray, sequences: np.ndarray, scores: np.ndarray | None = None
    ) -> None:
        """Append documents: ids end to end, the lengths of their sequences, how many of those each has, and scores."""
        first = self._writer.num_documents
        self._writer.add_many(ids, sequence_lengths, sequences)
        if self._scores is not None:
            self._scores[first : first + len(sequences)] = scores
        if self._counts is not None:
            self._counts.add(ids)

    def finish(self) -> None:
        """Have all bytes on disk, before a set that was there is touched: several sets are published alike."""
        if self._scores is not None:
            self._scores.flush()
        self._writer.finish()

    def describe(self, **facts: Any) -> Provenance:
        """Write the facts of a set that is published, but for those that are known here."""
        if self._counts is not None:
            facts["unigram_entropy"] = self._counts.entropy()
        files = dict(self._writer.files)
        if self._scores is not None:
            files["scores.npy"] = _file_facts(scores_path(self._writer.prefix))
        provenance = Provenance(
            documents=self._writer.num_documents,
            tokens=self._writer.num_tokens,
            created_by=f"megatron_lite {__version__}",
            files=files,
            **facts,
        )
        write_provenance(self._writer.prefix, provenance, self._within)
        return provenance


@contextlib.contextmanager
def token_set(
    prefix: str | os.PathLike,
    vocab_size: int | None = None,
    dtype: np.dtype | None = None,
    scored: int | None = None,
    counted: int | None = None,
    masked: bool = False,
    within: Path | None = None,
) -> Iterator[TokenSetWriter]:
    """A set that is published when the block ends well.

    `scored` is its number of documents where they have scores; `counted` the size of the vocabulary where the entropy
    of ids is to be found. Of a set that was there before, index, facts, scores and loss mask are gone first, but for a
    mask that was made for this one, which is `masked`; only when the new one is on disk. Until all is whole it lies in
    the folder `within` the same disk, if any. Raises DataError as IndexedWriter does, and for an id outside the
    vocabulary.
    """
    with contextlib.ExitStack() as publishing:
        writer = publishing.enter_context(IndexedWriter(prefix, vocab_size, dtype, within))
        scores = None
        if scored is not None:
            scores = publishing.enter_context(_score_column(scores_path(prefix), scored, within))
        made = TokenSetWriter(writer, scores, None if counted is None else IdCounts(counted), within)
        yield made
        made.finish()
        others = (manifest_path(prefix), scores_path(prefix), *(() if masked else paths(mask_prefix(prefix))))
        for path in (paths(prefix)[1], *others):
            path.unlink(missing_ok=True)


class IdCounts:
    """How often each id of a vocabulary occurs."""

    def __init__(self, vocab_size: int):
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count ids. Raises DataError for one outside the vocabulary."""
        size = len(self.counts)
        if len(ids) and int(ids.max()) >= size:
            raise DataError(f"token id {ids.max():,} is outside the vocabulary of {size:,} ids")
        self.counts += np.bincount(ids.astype(np.int64, copy=False), minlength=size)

    def entropy(self) -> float:
        """Unigram entropy, nats a token."""
        share = self.counts[self.counts > 0] / max(self.counts.sum(), 1)
        return float((share * -np.log(share)).sum()) + 0.0


@contextlib.contextmanager
def _score_column(path: Path, documents: int, within: Path | None) -> Iterator[np.memmap]:
    with published(path, within=within) as temporary:
        column = np.lib.format.open_memmap(temporary, "w+", "<f4", (documents,))
        yield column
        column.flush()


def _file_facts(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
