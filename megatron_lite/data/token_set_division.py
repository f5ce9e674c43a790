"""A token set divided by difficulty into sets of about as many tokens each, the easiest first, for a curriculum."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_lite.data.indexed import IndexedReader, paths
from megatron_lite.data.loss_mask import read_mask
from megatron_lite.data.provenance import read_provenance, scores_path
from megatron_lite.data.token_documents import joined_pieces
from megatron_lite.data.token_set_writer import token_set
from megatron_lite.data.token_sets import document_batches, document_lengths, read_scores
from megatron_lite.errors import DataError

Difficulty = Literal["length", "compression", "score"]
MOST_BUCKETS = 100
_RAW_DEFLATE = -15


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One part of a divided set: its prefix, what it holds, and the bounds of its documents' difficulty."""

    prefix: str
    documents: int
    tokens: int
    lowest: float
    highest: float


def divide(
    prefix: str,
    by: Difficulty,
    buckets: int,
    scores: str | None = None,
    descending: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> list[Bucket]:
    """Write PREFIX_bucket0, the easiest, to PREFIX_bucket{n-1}; inside each, documents are in the order they had.

    Difficulty is the number of tokens; the share of their size that a document's ids take when deflated, text that
    repeats itself being easy; or a score, of the set's own column or of the file `scores`. Low is easy, or high if
    `descending`. Buckets have as nearly equal numbers of tokens as whole documents allow. Memory is 50 bytes a
    document. `pause` is called between batches: what it raises leaves all as it was. Raises DataError for a column that
    is not of this set, a set with a loss mask, a bucket that would have no document, and one of another division that
    would stay.
    """
    reader = IndexedReader(prefix)
    left = [f"{prefix}_bucket{number}" for number in range(buckets, MOST_BUCKETS)]
    if left := [name for name in left if any(path.exists() for path in paths(name))]:
        raise DataError(
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''} of another division are there, and --buckets "
            f"{buckets} would leave {len(left)} among the new ones; remove them first"
        )
    if (mask := read_mask(reader)) is not None:
        raise DataError(
            f"{prefix} has a loss mask, {mask.prefix}, and parts would not; divide sets before they are joined"
        )
    lengths = document_lengths(reader)
    difficulty = _difficulty(reader, lengths, by, scores, pause)
    place = np.argsort(-difficulty if descending else difficulty, kind="stable")
    middles = np.cumsum(lengths[place]) - lengths[place] / 2
    number = np.empty(len(lengths), np.uint8)
    number[place] = np.minimum(middles * buckets / max(reader.num_tokens, 1), buckets - 1)
    sizes = np.bincount(number, minlength=buckets)
    if not sizes.all():
        raise DataError(
            f"{prefix} has {reader.num_documents:,} documents of {reader.num_tokens:,} tokens, and bucket "
            f"{int(np.argmin(sizes))} of {buckets} would have none of them; give fewer --buckets"
        )
    found = []
    for bucket, documents in enumerate(sizes.tolist()):
        of_bucket = number == bucket
        bounds = difficulty[of_bucket]
        tokens = int(lengths[of_bucket].sum())
        found.append(Bucket(f"{prefix}_bucket{bucket}", documents, tokens, float(bounds.min()), float(bounds.max())))
    _write(reader, lengths, number, found, {"by": by, "descending": descending, "of": prefix}, pause)
    return found


def _difficulty(
    reader: IndexedReader, lengths: np.ndarray, by: Difficulty, scores: str | None, pause: Callable[[], None]
) -> np.ndarray:
    """float64 [D]."""
    if by == "length":
        return lengths.astype(np.float64)
    if by == "compression":
        shares = np.zeros(len(lengths))
        for batch in document_batches(reader, lengths):
            pause()
            ends = np.cumsum(lengths[batch.documents])
            for document, ids in enumerate(np.split(batch.ids, ends[:-1]), batch.documents.start):
                shares[document] = _deflated_share(ids)
        return shares
    path = Path(scores) if scores else scores_path(reader.prefix)
    if not path.exists():
        raise DataError(
            f"{path} does not exist: a score for each document is made by --score-key in preprocessing, or given by "
            "--scores"
        )
    column = read_scores(path, len(lengths)).astype(np.float64)
    if unknown := int(np.isnan(column).sum()):
        raise DataError(f"{path} has no number for {unknown:,} of {len(column):,} documents")
    return column


def _deflated_share(ids: np.ndarray) -> float:
    if not len(ids):
        return 0.0
    packer = zlib.compressobj(wbits=_RAW_DEFLATE)
    return len(packer.compress(ids.data) + packer.flush()) / ids.nbytes


def _write(
    reader: IndexedReader,
    lengths: np.ndarray,
    number: np.ndarray,
    buckets: list[Bucket],
    how: dict[str, object],
    pause: Callable[[], None],
) -> None:
    """Deal the documents out and write the facts of each bucket."""
    facts = read_provenance(reader.prefix, reader.num_tokens)
    counted = facts and facts.vocab_size
    with contextlib.ExitStack() as publishing:
        sets = [publishing.enter_context(token_set(of.prefix, dtype=reader.dtype, counted=counted)) for of in buckets]
        for batch in document_batches(reader, lengths):
            pause()
            here = number[batch.documents]
            token_ends = np.cumsum(lengths[batch.documents])
            sequence_ends = np.cumsum(batch.sequences)
            for bucket in np.unique(here).tolist():
                chosen = np.flatnonzero(here == bucket)
                sequences = batch.sequences[chosen]
                sets[bucket].add(
                    joined_pieces(batch.ids, token_ends[chosen], lengths[batch.documents][chosen]),
                    joined_pieces(batch.sequence_lengths, sequence_ends[chosen], sequences),
                    sequences,
                )
        for made in sets:
            made.finish()
    if facts is None:
        return
    known = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    for name in ("documents", "tokens", "files", "created_by", "unigram_entropy", "job"):
        del known[name]
    for place, (bucket, made) in enumerate(zip(buckets, sets, strict=True)):
        difficulty = {**how, "bucket": place, "buckets": len(buckets)}
        difficulty |= {"lowest": bucket.lowest, "highest": bucket.highest}
        made.describe(**known | {"text_bytes": None, "score_key": None, "difficulty": difficulty})
