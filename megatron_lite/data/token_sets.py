"""Token sets that are there: the lengths of documents, what there is to say of a set, and what is wrong with one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.loss_mask import MASK_VALUES, count_targets, read_mask
from megatron_lite.data.provenance import Provenance, manifest_path, read_manifest, read_provenance, scores_path
from megatron_lite.data.token_documents import in_chunks
from megatron_lite.errors import DataError

_QUANTILES = (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)


def document_lengths(reader: IndexedReader) -> np.ndarray:
    """int64 [D]: the tokens of each document."""
    return np.diff(reader.document_tokens(0, reader.num_documents))


@dataclasses.dataclass(frozen=True)
class DocumentBatch:
    """Documents of a set that follow one another: their numbers, ids end to end, the lengths of their sequences, and
    how many of those each document has."""

    documents: slice
    ids: np.ndarray
    sequence_lengths: np.ndarray
    sequences: np.ndarray


def document_batches(reader: IndexedReader, lengths: np.ndarray) -> Iterator[DocumentBatch]:
    """All documents of a set, about a million tokens at a time; `lengths` are the documents'."""
    start = 0
    for some in in_chunks(lengths):
        stop = start + int(lengths[some].sum())
        bounds = reader.documents[some.start : some.stop + 1]
        yield DocumentBatch(some, reader.tokens(start, stop), reader.lengths[bounds[0] : bounds[-1]], np.diff(bounds))
        start = stop


def read_scores(path: Path, documents: int) -> np.ndarray:
    """float32 [D]: the scores of a set's documents, mapped. Raises DataError if they are not of so many."""
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no column of scores: {error}") from None
    if scores.shape != (documents,) or scores.dtype.kind not in "fiu":
        raise DataError(
            f"{path} has {scores.dtype} numbers of shape {scores.shape}; one for each of {documents:,} documents is "
            "needed"
        )
    return scores


def describe(prefix: str) -> dict[str, Any]:
    """What there is to say of a set, as JSON has it. Raises DataError if it cannot be opened."""
    reader = IndexedReader(prefix)
    lengths = document_lengths(reader)
    facts = read_provenance(prefix, reader.num_tokens)
    found = {
        "prefix": prefix,
        "documents": reader.num_documents,
        "sequences": reader.num_sequences,
        "tokens": reader.num_tokens,
        "dtype": reader.dtype.name,
        "bytes": reader.num_tokens * reader.dtype.itemsize,
        "fingerprint": reader.fingerprint,
    }
    if len(lengths):
        values = np.quantile(lengths, _QUANTILES, method="lower").tolist()
        found["document_lengths"] = {
            "mean": float(lengths.mean()),
            "empty": int((lengths == 0).sum()),
            "quantiles": {f"{share:g}": value for share, value in zip(_QUANTILES, values, strict=True)},
        }
    mask = read_mask(reader)
    found["loss_mask"] = None if mask is None else {"prefix": mask.prefix, "targets": count_targets(mask)}
    return found | {"manifest": facts and dataclasses.asdict(facts)}


def faults(prefix: str, vocab_size: int | None = None) -> Iterator[str]:
    """What is wrong with a set, a sentence each: index, ids, loss mask, and files against the manifest, where there are
    those."""
    try:
        reader = IndexedReader(prefix)
    except DataError as error:
        yield str(error)
        return
    facts = None
    try:
        if (mask := read_mask(reader)) is not None and (found := _ids_outside(mask, MASK_VALUES)):
            yield found
    except DataError as error:
        yield str(error)
    if manifest_path(prefix).exists():
        try:
            facts = read_manifest(prefix, reader.num_tokens)
        except DataError as error:
            yield str(error)
    if vocab_size is None and facts is not None:
        vocab_size = facts.vocab_size
    if vocab_size is not None and (found := _ids_outside(reader, vocab_size)):
        yield found
    if facts is not None:
        yield from _differences(prefix, reader, facts)


def _ids_outside(reader: IndexedReader, vocab_size: int) -> str | None:
    largest = reader.max_token_id()
    if largest < vocab_size:
        return None
    return f"{reader.prefix}.bin: token id {largest:,} is outside the vocabulary of {vocab_size:,} ids"


def _differences(prefix: str, reader: IndexedReader, facts: Provenance) -> Iterator[str]:
    if facts.documents != reader.num_documents:
        yield (
            f"{prefix}.idx: it has {reader.num_documents:,} documents, and the manifest speaks of {facts.documents:,}"
        )
    for suffix, stated in facts.files.items():
        path = Path(f"{prefix}.{suffix}")
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if type(stated.get("bytes")) is not int:
                    yield f"{manifest_path(prefix)}: it does not say how many bytes {path} has"
                elif size != stated["bytes"]:
                    yield f"{path}: it has {size:,} bytes, and the manifest speaks of {stated['bytes']:,}"
                elif hashlib.file_digest(file, "sha256").hexdigest() != stated.get("sha256"):
                    yield f"{path}: its SHA-256 is not the manifest's: some bytes have changed since it was made"
        except OSError as error:
            yield f"{path}: it cannot be read: {error.strerror}"
    if facts.score_key is not None:
        try:
            read_scores(scores_path(prefix), reader.num_documents)
        except DataError as error:
            yield str(error)
