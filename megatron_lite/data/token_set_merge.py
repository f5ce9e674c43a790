"""Several token sets as one: their documents one set after another, the bytes Megatron's merge_datasets gives."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite import log
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.loss_mask import mask_prefix, read_mask
from megatron_lite.data.provenance import Provenance, read_provenance, scores_path
from megatron_lite.data.token_set_writer import TokenSetWriter, token_set
from megatron_lite.data.token_sets import document_batches, document_lengths, read_scores
from megatron_lite.errors import DataError

_SAME = ("append_eod", "prepend_bos", "recipe", "shuffle_seed", "score_key")
"""Facts that a merged set has where all its parts agree."""


def merge(prefixes: Sequence[str], output: str, pause: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Write the documents of all sets, in this order, as the set `output`; its numbers of documents and tokens.

    It has scores where all have, and a manifest where all have one. `pause` is called between batches: what it raises
    leaves all as it was. Raises DataError for sets of unlike dtypes or tokenizers, for an output that is one of them,
    and where only some have a loss mask.
    """
    if Path(output).absolute() in {Path(prefix).absolute() for prefix in prefixes}:
        raise DataError(f"{output} is one of the sets to merge; give the merged set another name")
    readers = [IndexedReader(prefix) for prefix in prefixes]
    facts = [read_provenance(reader.prefix, reader.num_tokens) for reader in readers]
    insist_on_likeness(readers, facts)
    masks = [mask for reader in readers if (mask := read_mask(reader)) is not None]
    if len(masks) not in (0, len(readers)):
        raise DataError(
            f"{len(masks)} of {len(readers)} sets have a loss mask, such as {masks[0].prefix}: merge those with one "
            "and those without apart"
        )
    documents = sum(reader.num_documents for reader in readers)
    columns = [
        read_scores(scores_path(reader.prefix), reader.num_documents)
        for reader in readers
        if scores_path(reader.prefix).exists()
    ]
    has_scores = len(columns) == len(readers) and documents > 0
    scored = documents if has_scores else None
    counted = None if None in facts else max(of.vocab_size for of in facts)
    with contextlib.ExitStack() as publishing:
        made = publishing.enter_context(
            token_set(output, dtype=readers[0].dtype, scored=scored, counted=counted, masked=bool(masks))
        )
        _copy(readers, made, pause, columns if has_scores else None)
        made.finish()
        if masks:
            # Published ahead of the set, which would else be trained on whole.
            _copy(masks, publishing.enter_context(token_set(mask_prefix(output), dtype=masks[0].dtype)), pause)
    if None in facts:
        bare = next(reader.prefix for reader, known in zip(readers, facts, strict=True) if known is None)
        log.note(f"{bare} has no manifest, so {output} has none")
    else:
        made.describe(**combined_facts(prefixes, facts) | ({} if has_scores else {"score_key": None}))
    return documents, sum(reader.num_tokens for reader in readers)


def _copy(
    readers: Sequence[IndexedReader],
    made: TokenSetWriter,
    pause: Callable[[], None],
    columns: Sequence[np.ndarray] | None = None,
) -> None:
    for number, reader in enumerate(readers):
        for batch in document_batches(reader, document_lengths(reader)):
            pause()
            scores = None if columns is None else columns[number][batch.documents]
            made.add(batch.ids, batch.sequence_lengths, batch.sequences, scores)


def insist_on_likeness(readers: Sequence[IndexedReader], facts: Sequence[Provenance | None]) -> None:
    """Raise DataError for sets of unlike dtypes or tokenizers."""
    first = readers[0]
    for reader in readers:
        if reader.dtype != first.dtype:
            raise DataError(
                f"{first.prefix} has ids of {first.dtype} and {reader.prefix} of {reader.dtype}; preprocess the text "
                "of one again with the --vocab-size of the other"
            )
    known = [(reader.prefix, of) for reader, of in zip(readers, facts, strict=True) if of is not None]
    for prefix, of in known:
        before, known_first = known[0]
        if of.tokenizer_fingerprint != known_first.tokenizer_fingerprint:
            raise DataError(
                f"{before} was made by a {known_first.tokenizer_type} of {known_first.vocab_size:,} ids (fingerprint "
                f"{known_first.tokenizer_fingerprint[:12]}) and {prefix} by a {of.tokenizer_type} of {of.vocab_size:,} "
                f"(fingerprint {of.tokenizer_fingerprint[:12]}): one id would mean two texts; preprocess one again"
            )


def combined_facts(prefixes: Sequence[str], facts: Sequence[Provenance]) -> dict[str, Any]:
    """The facts that the parts of a set tell."""
    first = facts[0]
    text_bytes = [of.text_bytes for of in facts]
    inputs = {entry.get("name"): entry for of in facts for entry in of.inputs}
    agreed = [name for name in _SAME if all(getattr(of, name) == getattr(first, name) for of in facts)]
    return {
        "tokenizer_type": first.tokenizer_type,
        "tokenizer_fingerprint": first.tokenizer_fingerprint,
        "tokenizer": first.tokenizer,
        "vocab_size": first.vocab_size,
        "append_eod": False,
        "text_bytes": None if None in text_bytes else sum(text_bytes),
        "skipped": dict(sum((collections.Counter(of.skipped) for of in facts), collections.Counter())),
        "inputs": list(inputs.values()),
        "parts": [
            {"prefix": prefix, "documents": of.documents, "tokens": of.tokens, "recipe": of.recipe, "files": of.files}
            for prefix, of in zip(prefixes, facts, strict=True)
        ],
        **{name: getattr(first, name) for name in agreed},
    }
