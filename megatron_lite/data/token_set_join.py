"""Token sets put side by side: document i of each is a part of document i of the whole, some parts context alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loss_mask import mask_prefix
from megatron_lite.data.provenance import read_provenance
from megatron_lite.data.token_documents import in_chunks, places
from megatron_lite.data.token_set_merge import combined_facts, insist_on_likeness
from megatron_lite.data.token_set_writer import token_set
from megatron_lite.data.token_sets import document_lengths
from megatron_lite.errors import DataError


def join(
    prefixes: Sequence[str], context: Sequence[str], output: str, pause: Callable[[], None] = lambda: None
) -> tuple[int, int, int]:
    """Write the set `output`, and its loss mask where sets are `context`; documents, tokens, and tokens that count.

    An end-of-document token stays behind the last part alone, where manifests say that parts have one. `pause`
    is called between batches: what it raises leaves all as it was. Raises DataError for sets of unlike dtypes,
    tokenizers or numbers of documents, an output that is one of them, and context that is not, or that leaves nothing
    to predict.
    """
    _insist_on_names(prefixes, context, output)
    readers = [IndexedReader(prefix) for prefix in prefixes]
    facts = [read_provenance(reader.prefix, reader.num_tokens) for reader in readers]
    insist_on_likeness(readers, facts)
    if len({reader.num_documents for reader in readers}) > 1:
        sizes = ", ".join(f"{reader.num_documents:,} in {reader.prefix}" for reader in readers)
        raise DataError(f"sets are joined document by document, and there are {sizes}; make them of the same input")
    lengths = np.stack([document_lengths(reader) for reader in readers], axis=1)
    kept = lengths.copy()
    for part, of in enumerate(facts):
        if of is not None and of.append_eod:
            kept[:, part] -= (lengths[:, part] > 0) & lengths[:, part + 1 :].any(axis=1)
    counts = np.array([prefix not in context for prefix in prefixes], np.uint8)
    counted = None if None in facts else max(of.vocab_size for of in facts)
    with contextlib.ExitStack() as publishing:
        made = publishing.enter_context(
            token_set(output, dtype=readers[0].dtype, counted=counted, masked=bool(context))
        )
        # Published ahead of the set, which would else be trained on whole.
        mask = publishing.enter_context(IndexedWriter(mask_prefix(output), dtype=np.uint8)) if context else None
        for some, ids in _batches(readers, lengths, kept):
            pause()
            totals = kept[some].sum(axis=1)
            made.add(ids, totals[totals > 0], totals > 0)
            if mask is not None:
                flags = np.repeat(np.tile(counts, len(totals)), kept[some].ravel())
                mask.add_many(flags, totals[totals > 0], totals > 0)
        made.finish()
    if None not in facts:
        made.describe(**combined_facts(prefixes, facts) | {"score_key": None})
    return len(kept), int(kept.sum()), int(kept[:, counts == 1].sum())


def _insist_on_names(prefixes: Sequence[str], context: Sequence[str], output: str) -> None:
    absolute = {Path(prefix).absolute() for prefix in prefixes}
    if Path(output).absolute() in absolute:
        raise DataError(f"{output} is one of the sets to join; give the joined set another name")
    if unknown := [prefix for prefix in context if prefix not in prefixes]:
        raise DataError(f"{', '.join(unknown)} is context and none of the sets to join, {', '.join(prefixes)}")
    if len(set(context)) == len(prefixes):
        raise DataError("all sets are context, which leaves nothing to predict; name those that are read alone")


def _batches(
    readers: Sequence[IndexedReader], lengths: np.ndarray, kept: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Documents that follow one another, and the ids of their parts end to end; [D, parts] of each, all and kept."""
    begun = np.zeros(len(readers), np.int64)
    for some in in_chunks(lengths.sum(axis=1)):
        ends = begun + lengths[some].sum(axis=0)
        ids = np.concatenate([r.tokens(a, b) for r, a, b in zip(readers, begun.tolist(), ends.tolist(), strict=True)])
        # Where each part begins among them: sets one after another, documents in each.
        sizes = lengths[some].T.ravel()
        starts = (np.cumsum(sizes) - sizes).reshape(len(readers), -1).T.ravel()
        taken = kept[some].ravel()
        yield some, ids[places(starts, taken)]
        begun = ends
