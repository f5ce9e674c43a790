"""Which tokens of a set are targets: a second set, PREFIX.loss_mask, of a 0 or a 1 for each token."""

from __future__ import annotations

import os

import numpy as np

from megatron_lite.data.indexed import IndexedReader, paths
from megatron_lite.errors import DataError

MASK_VALUES = 2
_SUFFIX = ".loss_mask"
_CHUNK = 1 << 20


def mask_prefix(prefix: str | os.PathLike) -> str:
    """The prefix of a token set's loss mask."""
    return f"{os.fspath(prefix)}{_SUFFIX}"


def is_mask(prefix: str) -> bool:
    """Whether a prefix is that of a loss mask."""
    return prefix.endswith(_SUFFIX)


def count_targets(mask: IndexedReader) -> int:
    """How many tokens a mask leaves to be predicted."""
    return sum(
        int(np.count_nonzero(mask.tokens(at, min(at + _CHUNK, mask.num_tokens))))
        for at in range(0, mask.num_tokens, _CHUNK)
    )


def read_mask(reader: IndexedReader) -> IndexedReader | None:
    """The loss mask beside a token set; None where there is none.

    Raises DataError for one whose documents have other lengths than those of the set.
    """
    prefix = mask_prefix(reader.prefix)
    if not any(path.exists() for path in paths(prefix)):
        return None
    mask = IndexedReader(prefix)
    sizes = [(each.num_documents, each.num_sequences, each.num_tokens) for each in (reader, mask)]
    alike = sizes[0] == sizes[1] and all(
        np.array_equal(reader.lengths[at : at + _CHUNK], mask.lengths[at : at + _CHUNK])
        for at in range(0, reader.num_sequences, _CHUNK)
    )
    if not alike:
        raise DataError(
            f"{prefix} is not the loss mask of {reader.prefix}: it has {mask.num_documents:,} documents of "
            f"{mask.num_tokens:,} tokens and the set {reader.num_documents:,} of {reader.num_tokens:,}, or their "
            "lengths differ. Make both again, or remove the mask to train on all tokens."
        )
    return mask
