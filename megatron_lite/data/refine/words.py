"""Words of a text, numbers that stand for them, and numbers that stand for runs of them.

All of it is the same in every process and version: nothing depends on Python's salted hashes.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Scripts that write no spaces: a character there is a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_ASCII_WORD = re.compile(r"[0-9]+(?:[.,][0-9]+)*|\w+|\.\.+|--+|[^\w\s]", re.ASCII)
_WORD = re.compile(rf"[0-9]+(?:[.,][0-9]+)*|[^\W{_SPACELESS}]+|[{_SPACELESS}]|\.\.+|--+|[^\w\s]")
_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]+["'\u2019\u201d)\]]*(?=\s|$)""")
_REMEMBERED = 200_000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def split_words(text: str) -> list[str]:
    """Words, numbers and signs of a text in order, each apart; the parts of "don't" and "well-known" are words."""
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text)


def count_sentences(text: str) -> int:
    """Sentences of a line: ends of sentences, and what follows the last."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


def is_sign(word: str) -> bool:
    """Whether a word has neither letter nor digit."""
    return not word.isalnum() and not any(map(str.isalnum, word))


def hash64(text: str) -> int:
    """A 64-bit number of a text, by BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _WordHashes(dict):
    """Numbers of words as they stand."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        self[word] = number = self._number(word)
        return number

    def _number(self, word: str) -> int:
        return hash64(word)

    def of(self, words: Sequence[str]) -> np.ndarray:
        """uint64 numbers of words."""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


class _NormalHashes(_WordHashes):
    """Numbers of words without case, accents and digits; signs are left out."""

    def _number(self, word: str) -> int:
        if is_sign(word):
            return 0
        if word[0].isdigit() and not any(map(str.isalpha, word)):
            return hash64("0")
        bare = "".join(c for c in unicodedata.normalize("NFKD", word.lower()) if not unicodedata.combining(c))
        return hash64(bare.casefold())

    def of(self, words: Sequence[str]) -> np.ndarray:
        numbers = super().of(words)
        return numbers[numbers != 0]


WORD_HASHES = _WordHashes()
NORMAL_HASHES = _NormalHashes()


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Well-mixed uint64 of uint64, one to one (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> _SHIFTS[0])) * _MIXERS[0]
        numbers = (numbers ^ (numbers >> _SHIFTS[1])) * _MIXERS[1]
        return numbers ^ (numbers >> _SHIFTS[2])


class Grams:
    """Numbers of all runs of n words, n growing: `take(5)` after `take(4)` costs one step."""

    def __init__(self, words: np.ndarray):
        self._words = self._runs = words
        self._n = 1

    def take(self, n: int) -> np.ndarray:
        """uint64, one a run of n words; empty if there are fewer. n must not shrink."""
        assert n >= self._n
        with np.errstate(over="ignore"):
            while self._n < n:
                self._runs = self._runs[:-1] * _MULTIPLIER + self._words[self._n :]
                self._n += 1
        return self._runs


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """Well-mixed uint64, one a run of n words."""
    return mixed(Grams(words).take(n))
