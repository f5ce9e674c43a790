"""A document on its way through the stages, with what several of them look at computed once."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np

from megatron_lite.data.refine.words import normal_hashes, split_words


class Drop(NamedTuple):
    """Why a document is dropped: a reason that is counted, and the numbers behind it."""

    reason: str
    detail: str = ""


class Document:
    """Text, metadata, and the place it was read at. Another text forgets what was computed of the old one; one that
    is equal to it leaves it in its place.

    `is_page`: the text is HTML as it was read.
    """

    __slots__ = ("_counts", "_hashes", "_text", "_words", "is_page", "line", "metadata", "source")

    def __init__(self, text: str, metadata: dict[str, Any], source: str, line: int, is_page: bool = False):
        self.metadata, self.source, self.line, self.is_page = metadata, source, line, is_page
        self.text = text

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        if text == getattr(self, "_text", None):
            return
        self._text = text
        self._words: list[str] | None = None
        self._counts: collections.Counter[str] | None = None
        self._hashes: np.ndarray | None = None

    @property
    def words(self) -> list[str]:
        """Words, numbers and signs, as `split_words` gives them."""
        if self._words is None:
            self._words = split_words(self._text)
        return self._words

    @property
    def word_counts(self) -> collections.Counter[str]:
        """How often each of `words` occurs, in order of first occurrence."""
        if self._counts is None:
            self._counts = collections.Counter(self.words)
        return self._counts

    @property
    def normal_hashes(self) -> np.ndarray:
        """One uint64 a run of letters or digits, equal for those that differ in case, accents or digits alone."""
        if self._hashes is None:
            self._hashes = normal_hashes(self._text)
        return self._hashes
