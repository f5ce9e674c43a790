"""The stage that keeps what a model is to be examined with out of what it learns from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.stage import DocumentStage, Step
from megatron_lite.data.refine.words import grams, normal_hashes
from megatron_lite.data.text_blocks import read_blocks
from megatron_lite.data.text_documents import BadDocument, Record, parse_records
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError
from megatron_lite.publish import published

_INDEX = "decontaminate-{}.npy"


@dataclasses.dataclass(frozen=True)
class Decontaminate(DocumentStage):
    """Drops texts that have a run of n words in common with evaluation files; case, accents, digits, signs left out.

    Brown et al. 2020 (GPT-3) took n = 13. An item of fewer words is looked for whole, if it has `shortest`.
    """

    name: ClassVar[str] = "decontaminate"
    files: tuple[str, ...] = ()
    """Evaluation files, in the grammar of --input."""
    keys: tuple[str, ...] = ()
    """Fields of them to look for, or dotted paths; none: every text in them."""
    ngram: int = 13
    shortest: int = 8
    min_matches: int = 1
    """How many runs must be in common."""

    def problems(self) -> Iterator[str]:
        if not self.files:
            yield "files are not given; they name the evaluation sets."
        if not 1 <= self.shortest <= self.ngram:
            yield f"shortest {self.shortest} is not between 1 and ngram {self.ngram}."
        if self.min_matches < 1:
            yield f"min_matches {self.min_matches} is below 1, which drops everything."

    def prepare(self, folder: Path) -> None:
        """Write the hashes of the runs of the evaluation files, one array for each length."""
        try:
            found = self._runs()
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        for length in range(self.shortest, self.ngram + 1):
            with published(folder / _INDEX.format(length)) as path, open(path, "wb") as file:
                np.save(file, np.unique(np.concatenate(found.get(length, [np.empty(0, np.uint64)]))))

    def _runs(self) -> dict[int, list[np.ndarray]]:
        """Hashes of runs of words, by the length of the run."""
        found: dict[int, list[np.ndarray]] = {}
        for text in self._items():
            words = normal_hashes(text)
            length = min(len(words), self.ngram)
            if length >= self.shortest:
                found.setdefault(length, []).append(grams(words, length))
        if not found:
            raise DataError(
                f"no text of {self.shortest} words or more is in {', '.join(self.files)}; name its fields "
                "by keys, or look for shorter ones"
            )
        return found

    def _items(self) -> Iterator[str]:
        for source in find_sources(self.files):
            for block in read_blocks(source):
                for record in parse_records(block):
                    if isinstance(record, BadDocument):
                        raise DataError(f"{source.place(record.line)}: {record.reason}: {record.detail}")
                    yield from self._texts_of(record, source.name)

    def _texts_of(self, record: Record, name: str) -> Iterator[str]:
        if record.text is not None:
            yield record.text
        elif not self.keys:
            yield from _texts_in(record.fields)
        for key in self.keys if record.text is None else ():
            text = record.text_of(key)
            if isinstance(text, BadDocument):
                raise DataError(f"{name}, line {text.line}: {text.reason}: {text.detail}")
            yield text

    def open(self, folder: Path) -> Step:
        paths = {length: folder / _INDEX.format(length) for length in range(self.shortest, self.ngram + 1)}
        wanted = {length: known for length, path in paths.items() if len(known := np.load(path, mmap_mode="r"))}

        def step(document: Document) -> Drop | None:
            matches = 0
            for length, known in wanted.items():
                runs = grams(document.normal_hashes, length)
                at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
                matches += int((known[at] == runs).sum())
            if matches >= self.min_matches:
                return Drop("contaminated", f"{matches} runs of words")
            return None

        return step


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_texts_in, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_texts_in, value))
