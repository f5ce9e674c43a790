"""The quality and repetition rules of Gopher (Rae et al. 2021, section A.1)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step
from megatron_lite.data.refine.words import Grams, is_sign, word_hashes

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


@dataclasses.dataclass(frozen=True)
class GopherQuality(DocumentStage):
    """Drops texts whose words and lines are not those of prose. Words are those of `split_words`; None is no bound."""

    name: ClassVar[str] = "gopher_quality"
    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    """Share of lines."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end in one."""
    min_words_with_letter: float | None = 0.8
    """Share of words and signs."""
    min_stop_words: int | None = 2
    """How many of `stop_words` occur."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def open(self, folder: Path) -> Step:
        return self._step

    def _step(self, document: Document) -> Drop | None:
        counts = document.word_counts
        total = len(document.words)
        words = characters = with_letter = 0
        for word, count in counts.items():
            if not is_sign(word):
                words += count
                characters += count * len(word)
                if word.isalpha() or any(map(str.isalpha, word)):
                    with_letter += count
        if not words:
            return Drop("too few words", "0 words")
        text = document.text
        lines = text.splitlines()
        ellipses = text.count("...") + text.count("…")
        rules = (
            ("too few words", words, self.min_words, None),
            ("too many words", words, None, self.max_words),
            ("words too short", characters / words, self.min_mean_word_length, None),
            ("words too long", characters / words, None, self.max_mean_word_length),
            ("too many hashes", text.count("#") / total, None, self.max_hashes_per_word),
            ("too many ellipses", ellipses / total, None, self.max_ellipses_per_word),
            ("bullet points", _share(lines, _begins_a_bullet), None, self.max_bullet_lines),
            ("lines end in ellipses", _share(lines, _ends_in_ellipsis), None, self.max_ellipsis_lines),
            ("words without letters", with_letter / total, self.min_words_with_letter, None),
            ("too few stop words", sum(word in counts for word in self.stop_words), self.min_stop_words, None),
        )
        for reason, value, least, most in rules:
            if least is not None and value < least:
                return Drop(reason, f"{value:.4g} < {least:g}")
            if most is not None and value > most:
                return Drop(reason, f"{value:.4g} > {most:g}")
        return None


def _begins_a_bullet(line: str) -> bool:
    return line.lstrip().startswith(_BULLETS)


def _ends_in_ellipsis(line: str) -> bool:
    return line.rstrip().endswith(_ELLIPSES)


def _share(lines: Sequence[str], what: Callable[[str], bool]) -> float:
    return sum(map(what, lines)) / len(lines)


@dataclasses.dataclass(frozen=True)
class GopherRepetition(DocumentStage):
    """Drops texts that repeat themselves: their lines, their paragraphs, or runs of words. All bounds are shares.

    `top_n` bounds the characters of the most frequent run of n words, `repeated_n` those of all runs of n words that
    occurred before, each character counted once. A negative bound drops any repetition, one of 1 none.
    """

    name: ClassVar[str] = "gopher_repetition"
    max_repeated_lines: float = 0.30
    max_repeated_line_characters: float = 0.20
    max_repeated_paragraphs: float = 0.30
    max_repeated_paragraph_characters: float = 0.20
    top_2: float = 0.20
    top_3: float = 0.18
    top_4: float = 0.16
    repeated_5: float = 0.15
    repeated_6: float = 0.14
    repeated_7: float = 0.13
    repeated_8: float = 0.12
    repeated_9: float = 0.11
    repeated_10: float = 0.10

    def open(self, folder: Path) -> Step:
        return self._step

    def _step(self, document: Document) -> Drop | None:
        text = document.text
        if not text.strip():
            return Drop("empty")
        for what, pieces, most, most_characters in (
            (
                "paragraphs",
                _PARAGRAPHS.split(text.strip()),
                self.max_repeated_paragraphs,
                self.max_repeated_paragraph_characters,
            ),
            ("lines", _LINES.split(text), self.max_repeated_lines, self.max_repeated_line_characters),
        ):
            repeated, characters = repeats(pieces)
            if repeated > most * len(pieces):
                return Drop(f"repeated {what}", f"{repeated / len(pieces):.3f} > {most:g}")
            if characters > most_characters * len(text):
                return Drop(f"characters of repeated {what}", f"{characters / len(text):.3f} > {most_characters:g}")
        return self._runs_of_words(document)

    def _runs_of_words(self, document: Document) -> Drop | None:
        words = document.words
        size = len(document.text)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        runs = Grams(word_hashes(words))
        for n in (2, 3, 4):
            most = getattr(self, f"top_{n}")
            characters = _top_characters(runs.take(n), ends, n, most * size)
            if characters > most * size:
                return Drop(f"frequent run of {n} words", f"{characters / size:.3f} > {most:g}")
        for n in range(5, 11):
            most = getattr(self, f"repeated_{n}")
            characters = _repeated_characters(runs.take(n), ends, n)
            if characters is None:
                return None  # no run of n is repeated, so no longer one is
            if characters > most * size:
                return Drop(f"repeated runs of {n} words", f"{characters / size:.3f} > {most:g}")
        return None


def repeats(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces equal one before them, and their characters."""
    seen: set[str] = set()
    repeated = characters = 0
    for piece in pieces:
        if piece in seen:
            repeated += 1
            characters += len(piece)
        else:
            seen.add(piece)
    return repeated, characters


def _top_characters(hashes: np.ndarray, ends: np.ndarray, n: int, bound: float) -> int:
    """Characters, with blanks between words, of the (first) most frequent run; 0 if surely within the bound."""
    if not len(hashes):
        return 0
    ordered = np.sort(hashes)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(ordered)))
    longest = int((ends[n:] - ends[:-n]).max()) + n - 1
    if counts.max() * longest <= bound:
        return 0
    top = ordered[starts[counts == counts.max()]]
    first = int(np.flatnonzero(np.isin(hashes, top))[0])
    return int(counts.max()) * (int(ends[first + n] - ends[first]) + n - 1)


def _repeated_characters(hashes: np.ndarray, ends: np.ndarray, n: int) -> int | None:
    """Characters of runs that occurred before, the next being looked for behind such a run. None if all runs differ."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return None
    several = np.zeros(len(hashes), bool)
    several[order[1:][same]] = several[order[:-1][same]] = True
    places = np.flatnonzero(several)
    lengths = ends[places + n] - ends[places]
    seen: set[int] = set()
    characters = following = 0
    for place, run, length in zip(places.tolist(), hashes[places].tolist(), lengths.tolist(), strict=True):
        if place < following:
            continue
        if run in seen:
            characters += length
            following = place + n
        else:
            seen.add(run)
    return characters
