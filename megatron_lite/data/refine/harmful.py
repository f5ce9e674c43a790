"""The stages against harmful text: a list of words, and a classifier."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step, required
from megatron_lite.errors import DataError

_PIECE_CHARACTERS = 1000
_PIECES = 64


@dataclasses.dataclass(frozen=True)
class HarmfulWords(DocumentStage):
    """Drops texts with words or phrases of a list, one a line in a file (# begins a remark), whatever their case."""

    name: ClassVar[str] = "harmful_words"
    file: str = ""
    at_least: int = 1
    """Drop from this many occurrences on."""
    at_least_per_thousand_words: float = 0.0
    """And if they are as frequent as this: a long text may cite one."""

    def problems(self) -> Iterator[str]:
        if not self.file:
            yield "file is not given; it names the list of words, one a line."
        if self.at_least < 1:
            yield f"at_least {self.at_least} is below 1, which drops everything."

    def words(self) -> list[str]:
        """The words and phrases of the list. Raises DataError."""
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.name}: the list {self.file} cannot be read: {error}") from None
        words = sorted({" ".join(line.partition("#")[0].split()).lower() for line in lines} - {""})
        if not words:
            raise DataError(f"{self.name}: the list {self.file} has no words, one a line")
        return words

    def prepare(self, folder: Path) -> None:
        self.words()

    def open(self, folder: Path) -> Step:
        # Longest first: an alternative takes the first that fits.
        words = sorted(self.words(), key=len, reverse=True)
        phrases = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words)
        pattern = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)")

        def step(document: Document) -> Drop | None:
            found = pattern.findall(document.text.lower())
            if len(found) < self.at_least:
                return None
            if len(found) * 1000 < self.at_least_per_thousand_words * len(document.words):
                return None
            return Drop("harmful words", f"{len(found)}, first {found[0]!r}")

        return step


@dataclasses.dataclass(frozen=True)
class HarmfulClassifier(DocumentStage):
    """Drops texts of which some piece is offensive by alt-profanity-check (a linear model over words, English).

    Pieces are of about 1,000 characters, at most 64 spread over a text.
    """

    name: ClassVar[str] = "harmful_classifier"
    threshold: float = 0.9
    """Probability from which a piece is offensive."""
    share: float = 0.0
    """Share of pieces beyond which a text is dropped."""

    def problems(self) -> Iterator[str]:
        if not 0 < self.threshold <= 1:
            yield f"threshold {self.threshold} is no probability; 0.9 is usual."
        if not 0 <= self.share < 1:
            yield f"share {self.share} is not between 0 and 1."

    def open(self, folder: Path) -> Step:
        library = required("profanity_check", "alt-profanity-check", self.name)

        def step(document: Document) -> Drop | None:
            text = document.text
            pieces = [text[at : at + _PIECE_CHARACTERS] for at in range(0, len(text), _PIECE_CHARACTERS)]
            pieces = pieces[:: -(-len(pieces) // _PIECES)] if pieces else [""]
            chances = library.predict_prob(pieces)
            share = float((chances >= self.threshold).mean())
            if share > self.share:
                return Drop("offensive", f"{share:.3f} of {len(pieces)} pieces, at most {chances.max():.2f}")
            return None

        return step
