"""The rules of C4 and of FineWeb for pages of the web."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.gopher import repeats
from megatron_lite.data.refine.stage import DocumentStage, Step
from megatron_lite.data.refine.words import count_sentences

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_ENDS = (".", "?", "!", '"', "'", "”", "’")
_POLICY = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies")
# Ends of sentences in the scripts of the world, as far as they are one character.
_TERMINAL = tuple(
    ".?!\u203d\u2047\u2048\u2049\u203c\u2026\u3002\uff01\uff1f\uff0e\uff61\u061f\u06d4\u0964\u0965\u0589\u1362\u1367\u104b\u17d4"
)


@dataclasses.dataclass(frozen=True)
class C4Quality(DocumentStage):
    """Takes lines out that are no sentences, and drops documents of which too little stays (Raffel et al. 2020, C4)."""

    name: ClassVar[str] = "c4_quality"
    terminal_punctuation: bool = True
    """Lines must end in one of . ? ! and quotes, and not in an ellipsis."""
    min_words_per_line: int = 3
    max_word_length: int = 1000
    """Lines with a longer word are taken out."""
    min_sentences: int = 5
    """Of a document, in the lines that stay; 0: no bound."""
    citations: bool = True
    """Take out [1], [edit], [citation needed]."""
    javascript: bool = True
    """Take out lines that speak of it."""
    policies: bool = True
    """Take out lines on cookies, privacy and terms of use."""
    lorem_ipsum: bool = True
    """Drop documents with this text of typesetters."""
    curly_brackets: bool = True
    """Drop documents with a {: they are code. Lines taken out before are not looked at."""

    def problems(self) -> Iterator[str]:
        for name in ("min_words_per_line", "max_word_length", "min_sentences"):
            if getattr(self, name) < 0:
                yield f"{name} {getattr(self, name)} is below 0; give 0 or more."

    def open(self, folder: Path) -> Step:
        return self._step

    def _step(self, document: Document) -> Drop | None:
        kept: list[str] = []
        sentences = 0
        for line in map(str.strip, document.text.splitlines()):
            words = line.split()
            if len(line) > self.max_word_length and any(len(word) > self.max_word_length for word in words):
                continue
            if self.citations and "[" in line:
                line = _CITATION.sub("", line)
            if self.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith("...")):
                continue
            if len(words) < self.min_words_per_line:
                continue
            lower = line.lower()
            if self.lorem_ipsum and "lorem ipsum" in lower:
                return Drop("lorem ipsum")
            if self.javascript and "javascript" in lower:
                continue
            if self.curly_brackets and "{" in line:
                return Drop("curly bracket")
            if self.policies and _POLICY.search(lower):
                continue
            if sentences < self.min_sentences:
                sentences += count_sentences(line)
            kept.append(line)
        if sentences < self.min_sentences:
            return Drop("too few sentences", f"{sentences} < {self.min_sentences}")
        text = "\n".join(kept).strip()
        document.text = text
        return None if text else Drop("empty")


@dataclasses.dataclass(frozen=True)
class FineWebQuality(DocumentStage):
    """Drops documents made of lists and short or repeated lines (Penedo et al. 2024, FineWeb)."""

    name: ClassVar[str] = "fineweb_quality"
    min_punctuated_lines: float = 0.12
    """Share of lines that end a sentence."""
    max_short_lines: float = 0.67
    """Share of lines of `short_line` characters or fewer."""
    short_line: int = 30
    max_repeated_characters: float = 0.01
    """Share of characters in lines that occurred before."""
    max_new_lines_per_word: float = 0.3

    def open(self, folder: Path) -> Step:
        return self._step

    def _step(self, document: Document) -> Drop | None:
        text = document.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Drop("empty")
        punctuated = sum(line.endswith(_TERMINAL) for line in lines) / len(lines)
        if punctuated < self.min_punctuated_lines:
            return Drop("lines without punctuation", f"{punctuated:.3f} < {self.min_punctuated_lines:g}")
        short = sum(len(line) <= self.short_line for line in lines) / len(lines)
        if short > self.max_short_lines:
            return Drop("short lines", f"{short:.3f} > {self.max_short_lines:g}")
        new_lines = text.count("\n")
        repeated = repeats(lines)[1] / (len(text) - new_lines)
        if repeated > self.max_repeated_characters:
            return Drop("characters of repeated lines", f"{repeated:.3f} > {self.max_repeated_characters:g}")
        if new_lines > self.max_new_lines_per_word * len(document.words):
            return Drop("list", f"{new_lines} lines of {len(document.words)} words")
        return None
