"""A quality score learned from examples: how much more likely a text's words are in good text than in raw text.

Words and pairs of neighbours are hashed into buckets, whose frequencies are counted in both kinds of text; the score is
the mean of log p_good - log p_raw over a text (Xie et al. 2023, DSIR; there for drawing samples, here for a threshold).
Above 0 a text is more like the good ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_lite.data.refine.words import grams, mixed, normal_hashes
from megatron_lite.data.text_blocks import Limit, limited, read_blocks
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import Source
from megatron_lite.errors import DataError
from megatron_lite.publish import published

BUCKETS = 1 << 18
_SMOOTHING = 0.5
"""Added to each count, so that what was hardly seen weighs little."""


def _features(text: str) -> np.ndarray:
    """Buckets of the words and of the pairs of words of a text."""
    words = normal_hashes(text)
    return (np.concatenate([mixed(words), grams(words, 2)]) % np.uint64(BUCKETS)).astype(np.int64)


class Importance:
    """The score of a text, 0 for one without words, by weights that `learn` has written."""

    def __init__(self, weights: str):
        try:
            self._weights = np.load(weights, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"importance: {weights} cannot be read: {error}") from None
        if self._weights.shape != (BUCKETS,):
            raise DataError(f"importance: {weights} has shape {self._weights.shape} for ({BUCKETS},); learn it again")

    def __call__(self, text: str) -> float:
        features = _features(text)
        return float(self._weights[features].mean()) if len(features) else 0.0


def learn(good: Sequence[Source], raw: Sequence[Source], key: str, limit: Limit, path: Path) -> None:
    """Write float32 weights [BUCKETS] as .npy. At most `limit` is read of each kind; `key` is the field of the text.

    Raises DataError for a kind without text.
    """
    weights = _log_frequencies(good, key, limit) - _log_frequencies(raw, key, limit)
    with published(path) as temporary, open(temporary, "wb") as file:
        np.save(file, weights.astype(np.float32))


def _log_frequencies(sources: Sequence[Source], key: str, limit: Limit) -> np.ndarray:
    counts = np.full(BUCKETS, _SMOOTHING)
    for text in _texts(sources, key, limit):
        counts += np.bincount(_features(text), minlength=BUCKETS)
    if counts.sum() == _SMOOTHING * BUCKETS:
        raise DataError(f"there is no text to learn from in {', '.join(source.name for source in sources)}")
    return np.log(counts / counts.sum())


def _texts(sources: Sequence[Source], key: str, limit: Limit) -> Iterator[str]:
    blocks = itertools.chain.from_iterable(read_blocks(source, fields=(key,)) for source in sources)
    for block in limited(blocks, limit):
        for document in parse_block(block, (key,)):
            if not isinstance(document, BadDocument):
                yield document[0]
