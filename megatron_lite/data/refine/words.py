"""Words of a text, numbers that stand for them, and numbers that stand for runs of them.

All of it is the same in every process and version: nothing depends on Python's salted hashes.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Scripts that write no spaces: a character there is a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_SPACELESS_OR_NOT = re.compile(f"[{_SPACELESS}]|[^{_SPACELESS}]+")
_MARKS = r"…,:;!?¿؟¡()\[\]{}<>_#*&。？！，、；：～·।،۔؛٪'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_MONEY = r"$£€¥฿₽₴₹₩₪"
_BEFORE = re.compile(rf"\.\.+|[{_MARKS}{_MONEY}§%=—–]|\+(?![0-9])")
_BEHIND = re.compile(
    rf"(?:\.\.+|--+|[{_MARKS}—–]|['’][sS]|(?<=[0-9])(?:\+|[{_MONEY}%]|[kcm]?m|[km]?g|[KMGT]B?)|"
    rf"(?:(?<=[^\WA-Z_])|(?<=[%²\-+{_MARKS}])|(?<=[A-Z][A-Z]))\.)\Z"
)
_BETWEEN = re.compile(
    r"\.\.+|…|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[a-z'\"”“`‘’])\.(?=[A-Z'\"”“`‘’])|(?<=[^\W\d_]),(?=[^\W\d_])|"
    r"(?<=[^\W_])(?:---?|——|[-–—~:<>=/])(?=[^\W\d_])"
)
_SHORTENED = re.compile(r"([^\W\d_]+)(n['’]t|['’](?:m|re|ve|ll|d))\Z", re.I)
_KEEPS_ITS_DOT = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]\.|(?:[Mm]rs?|[Dd]r|St|Jr|Sr|vs|Prof|Inc|Ltd|Co|Corp|[a-z])\.")
_ADDRESS = re.compile(
    r"(?:https?|ftp|file)://\S+|(?:[\w-]+\.)+[a-z]{2,}(?::\d{2,5})?(?:[/?#]\S*)?|\S+@(?:[\w-]+\.)+[a-z]{2,}"
)
_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]+["'\u2019\u201d)\]]*(?=\s|$)""")
_LETTERS_AND_DIGITS = re.compile(rf"[0-9]+(?:[.,][0-9]+)*|[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_REMEMBERED = 200_000
_REMEMBERED_LENGTH = 64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class _Memory(dict[str, T]):
    """What was made of short strings, as many as fit: in any text few make up most."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> T:
        value = self._make(key)
        if len(key) <= _REMEMBERED_LENGTH:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[key] = value
        return value


def split_words(text: str) -> list[str]:
    """Words, numbers and signs of a text in order, each apart, as linguists cut English: "don't" is do and n't.

    Signs are cut off at both ends of what white space parts, and hyphens and the like between letters; addresses and
    numbers stay whole. spaCy's tokenizer, which datatrove counts by, cuts nearly alike.
    """
    return list(itertools.chain.from_iterable(map(_WORDS.__getitem__, text.split())))


def _cut(chunk: str) -> tuple[str, ...]:
    if chunk.isalpha() and chunk.isascii():
        return (chunk,)
    words: list[str] = []
    for piece in _SPACELESS_OR_NOT.findall(chunk):
        words += _cut_piece(piece)
    return tuple(words)


def _cut_piece(piece: str) -> list[str]:
    before: list[str] = []
    behind: list[str] = []
    while piece:
        if _KEEPS_ITS_DOT.fullmatch(piece):
            break
        start = _BEFORE.match(piece) or _symbol(piece[0])
        if start:
            before.append(piece[: start if start is True else start.end()])
            piece = piece[len(before[-1]) :]
            continue
        end = _BEHIND.search(piece) or _symbol(piece[-1])
        if not end:
            break
        at = len(piece) - 1 if end is True else end.start()
        behind.append(piece[at:])
        piece = piece[:at]
    if piece:
        if short := _SHORTENED.fullmatch(piece):
            before += short.groups()
        elif _KEEPS_ITS_DOT.fullmatch(piece) or _ADDRESS.fullmatch(piece):
            before.append(piece)
        else:
            at = 0
            for match in _BETWEEN.finditer(piece):
                before += filter(None, (piece[at : match.start()], match[0]))
                at = match.end()
            before += filter(None, (piece[at:],))
    return before + behind[::-1]


def _symbol(character: str) -> bool:
    return not character.isascii() and character != "°" and unicodedata.category(character) == "So"


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


def word_hashes(words: list[str]) -> np.ndarray:
    """uint64, one a word."""
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def normal_hashes(text: str) -> np.ndarray:
    """uint64, one for each run of letters or digits; equal for those that differ in case, accents or digits alone."""
    return np.fromiter(itertools.chain.from_iterable(map(_NORMAL_HASHES.__getitem__, text.split())), np.uint64)


def _normal(chunk: str) -> tuple[int, ...]:
    bare = chunk.lower()
    if not bare.isascii():
        bare = "".join(c for c in unicodedata.normalize("NFKD", bare) if not unicodedata.combining(c)).casefold()
    return tuple(hash64("0" if word[0].isdecimal() else word) for word in _LETTERS_AND_DIGITS.findall(bare))


_WORDS: _Memory[tuple[str, ...]] = _Memory(_cut)
_HASHES: _Memory[int] = _Memory(hash64)
_NORMAL_HASHES: _Memory[tuple[int, ...]] = _Memory(_normal)


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
