"""The stage that leaves one of each: documents, paragraphs or lines that are the same to the letter."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.spill import parted, runs, temporary_folder
from megatron_lite.data.refine.stage import DROPPED, KEPT, CorpusStage

_PARAGRAPH = re.compile(r"(\n\s*\n)")
_LINE = re.compile(r"(\n)")
_RECORD_BYTES = 3 * 8


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(CorpusStage):
    """Keeps the first of equal documents, or cuts out all but the first of equal paragraphs or lines of the corpus.

    Compared are 128-bit BLAKE2b hashes, by default of the text without case and with any white space as one blank.
    """

    name: ClassVar[str] = "exact_duplicates"
    keys: ClassVar[int] = 2
    of: Literal["document", "paragraph", "line"] = "document"
    ignore_case_and_space: bool = True
    min_characters: int = 0
    """Shorter paragraphs and lines are let be: headings and names repeat rightly."""

    def problems(self) -> Iterator[str]:
        if self.min_characters < 0:
            yield f"min_characters {self.min_characters} is below 0; give 0 or more."
        if self.min_characters and self.of == "document":
            yield "min_characters is for paragraphs and lines; the stage length bounds documents."

    @property
    def edits(self) -> bool:
        return self.of != "document"

    def sign(self, document: Document) -> np.ndarray:
        pieces = [document.text] if self.of == "document" else self._cut(document.text)[::2]
        return np.frombuffer(b"".join(map(self._key, pieces)), "<u8").reshape(-1, 2)

    def _cut(self, text: str) -> list[str]:
        """Pieces and, between them, what parts them."""
        return (_PARAGRAPH if self.of == "paragraph" else _LINE).split(text)

    def _key(self, piece: str) -> bytes:
        if len(piece) < self.min_characters or (self.edits and not piece.strip()):
            return bytes(16)
        if self.ignore_case_and_space:
            piece = " ".join(piece.split()).lower()
        return hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def resolve(
        self, units: Sequence[Callable[[], np.ndarray]], verdicts: np.ndarray, folder: Path, memory: int
    ) -> None:
        def records() -> Iterator[np.ndarray]:
            start = 0
            for load in units:
                keys = load()
                wanted = (verdicts[start : start + len(keys)] == KEPT) & keys.any(axis=1)
                rows = np.arange(start, start + len(keys), dtype=np.uint64)
                yield np.column_stack([keys, rows])[wanted]
                start += len(keys)

        with temporary_folder(folder) as inside:
            for block in parted(records(), len(verdicts) * _RECORD_BYTES, inside, memory):
                order, starts = runs(block[:, :2])
                repeated = np.ones(len(order), bool)
                repeated[starts] = False
                verdicts[block[order[repeated], 2].astype(np.int64)] = DROPPED

    def apply(self, document: Document, verdicts: np.ndarray) -> Drop | None:
        if not self.edits:
            return Drop("duplicate") if verdicts[0] == DROPPED else None
        if not (verdicts == DROPPED).any():
            return None
        pieces = self._cut(document.text)
        kept: list[str] = []
        for number, verdict in enumerate(verdicts):
            if verdict != DROPPED:
                kept += pieces[2 * number : 2 * number + 2]
        document.text = "".join(kept).strip("\n")
        return None if document.text.strip() else Drop(f"only repeated {self.of}s")
