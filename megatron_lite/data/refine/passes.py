"""The passes of a recipe, and what a worker does to one unit of the input in one of them.

A pass ends where documents are to be compared over the whole corpus: all are signed, the verdicts are found when the
last one is, and the next pass begins with acting on them.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.refine.crashes import Whereabouts
from megatron_lite.data.refine.document import Document, Drop
from megatron_lite.data.refine.output import OutputFormat, json_line, packed, unpacked_values
from megatron_lite.data.refine.stage import CorpusStage, DocumentStage, Stage
from megatron_lite.data.refine.tally import StageTally
from megatron_lite.data.text_blocks import Block
from megatron_lite.data.text_documents import MISSING, BadDocument, parse_records, value_at
from megatron_lite.data.unit_file import UnitFile, open_unit, unit_number, write_unit
from megatron_lite.errors import MegatronLiteError
from megatron_lite.kernels.crc32 import crc32

READ = "read"
"""The name of reading in reports, and its place before the stages."""
ALL_METADATA = "all"
_BETWEEN: OutputFormat = "jsonl.zst"
_PAGES = ("html", "warc")


@dataclasses.dataclass(frozen=True)
class Pass:
    """What documents go through one by one: verdicts of the last pass's comparisons, stages that edit and filter, and
    signing for the next comparisons. The numbers are places in the recipe."""

    number: int
    apply: tuple[int, ...]
    run: tuple[int, ...]
    sign: tuple[int, ...]
    is_last: bool


def plan(stages: Sequence[Stage]) -> list[Pass]:
    """The passes of a recipe. Comparisons that follow one another share one, up to one that edits texts."""
    parts: list[tuple[list[int], list[int]]] = [([], [])]
    for number, stage in enumerate(stages):
        run, sign = parts[-1]
        compares = isinstance(stage, CorpusStage)
        if sign and (not compares or stages[sign[-1]].edits):
            run, sign = [], []
            parts.append((run, sign))
        (sign if compares else run).append(number)
    if parts[-1][1]:
        parts.append(([], []))
    passes = []
    apply: tuple[int, ...] = ()
    for number, (run, sign) in enumerate(parts):
        passes.append(Pass(number, apply, tuple(run), tuple(sign), number == len(parts) - 1))
        apply = tuple(sign)
    return passes


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Where the verdicts of a comparison lie for the documents of one unit."""

    stage: int
    path: Path
    start: int
    count: int

    def rows(self) -> np.ndarray:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return np.frombuffer(file.read(self.count), np.uint8)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of a pass: a block of the input, or what the last pass left of it, and the verdicts on that."""

    path: Path
    """The file to write."""
    block: Block | None = None
    before: Path | None = None
    verdicts: tuple[Verdicts, ...] = ()
    crashes: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Documents that have killed a worker: (stage, signal)."""


@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """What a worker has to know besides its pass. `prepared` is the folder stages have prepared files in."""

    stages: tuple[Stage, ...]
    prepared: Path
    job: str
    text_key: str
    keep_metadata: tuple[str, ...]
    output_format: OutputFormat
    save_dropped: bool

    def kept(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields that are carried to the end, by name or dotted path, which is then their name."""
        if ALL_METADATA in self.keep_metadata:
            return fields
        found = {name: value_at(fields, name) for name in self.keep_metadata}
        return {name: value for name, value in found.items() if value is not MISSING}


class UnitRefiner:
    """What a worker does: units in, their files out. Called with a unit, gives (bytes read, documents, characters)."""

    def __init__(self, settings: RefineSettings, this: Pass):
        self._settings, self._pass = settings, this
        self._steps = {number: self._opened(number) for number in this.run}
        self._whereabouts: Whereabouts | None = None

    def _opened(self, number: int) -> Callable[[Document], Drop | None]:
        stage = self._settings.stages[number]
        assert isinstance(stage, DocumentStage)
        return stage.open(self._settings.prepared)

    def __call__(self, unit: Unit) -> tuple[int, int, int]:
        if self._whereabouts is None:
            self._whereabouts = Whereabouts(unit.path.parent)
        work = _UnitWork(self._settings, self._pass, self._steps, unit, self._whereabouts)
        if unit.block is not None:
            for document in work.read(unit.block):
                work.take(document, {})
            read, crc = unit.block.read, crc32(unit.block.data)
        else:
            before = open_unit(unit.before)
            rows = {verdicts.stage: _by_document(before, verdicts) for verdicts in unit.verdicts}
            for index, line in enumerate(unpacked_values(before.section("documents"))):
                work.take(Document(*line), {number: of[index] for number, of in rows.items()})
            read, crc = 0, 0
        work.write(unit.path, crc)
        return read, work.documents, work.characters


def _by_document(before: UnitFile, verdicts: Verdicts) -> Sequence[np.ndarray]:
    counts = np.frombuffer(before.section(f"rows-{verdicts.stage}"), np.uint32)
    return np.split(verdicts.rows(), np.cumsum(counts)[:-1]) if len(counts) else []


class _UnitWork:
    """One unit in the making."""

    def __init__(
        self,
        settings: RefineSettings,
        this: Pass,
        steps: dict[int, Callable[[Document], Drop | None]],
        unit: Unit,
        whereabouts: Whereabouts,
    ):
        self._settings, self._pass, self._steps = settings, this, steps
        self._number, self._crashes, self._whereabouts = unit_number(unit.path), unit.crashes, whereabouts
        self._tallies = {name: StageTally() for name in (READ, *this.apply, *this.run, *this.sign)}
        self._lines: list[bytes] = []
        self._keys: dict[int, list[np.ndarray]] = {number: [] for number in this.sign}
        self._dropped: list[bytes] = []
        self._quarantined: list[bytes] = []
        self.documents = self.characters = 0

    def read(self, block: Block) -> Iterator[Document]:
        """The documents of a block; what cannot be read is dropped here."""
        source, tally = block.source, self._tallies[READ]
        key = source.text_key if source.text_key and self._settings.text_key == "text" else self._settings.text_key
        started = time.thread_time()
        for record in parse_records(block):
            text = record if isinstance(record, BadDocument) else record.text_of(key)
            tally.documents += 1
            if isinstance(text, BadDocument):
                tally.drop(text.reason, text.detail, source.place(text.line), "")
                continue
            tally.characters += len(text)
            tally.kept += 1
            tally.kept_characters += len(text)
            fields = self._settings.kept({name: value for name, value in record.fields.items() if name != key})
            tally.seconds += time.thread_time() - started
            yield Document(text, fields, source.name, record.line, source.documents in _PAGES)
            started = time.thread_time()

    def take(self, document: Document, verdicts: dict[int, np.ndarray]) -> None:
        """One document through the pass."""
        self.documents += 1
        self.characters += len(document.text)
        keys: dict[int, np.ndarray] = {}
        fatal, by = self._crashes.get(self.documents, (None, 0))
        for number in (*self._pass.apply, *self._pass.run, *self._pass.sign):
            stage = self._settings.stages[number]
            before = document.text
            started = time.thread_time()
            self._whereabouts.note(self._number, self.documents, number)
            try:
                if number == fatal:
                    raise ChildProcessError(f"it killed its worker by {signal.Signals(by).name}")
                if number in verdicts:
                    drop = stage.apply(document, verdicts[number])
                elif number in self._keys:
                    keys[number], drop = stage.sign(document), None
                else:
                    drop = self._steps[number](document)
            except (MegatronLiteError, KeyboardInterrupt):
                raise
            except BaseException as error:  # Rust's panics are no Exception, nor is SystemExit
                self._count(number, before, None, time.thread_time() - started)
                self._set_aside(number, stage.name, error, document, before)
                return
            self._count(number, before, None if drop else document.text, time.thread_time() - started)
            if drop:
                self._drop(number, drop, document, before)
                return
        try:
            line = self._line(document)
        except TypeError as error:
            self._set_aside(READ, "write", error, document, document.text)
            return
        self._lines.append(line)
        for number, rows in keys.items():
            self._keys[number].append(rows)

    def _count(self, number: int, before: str, after: str | None, seconds: float) -> None:
        """A comparison is two parts, signing and acting on it: its documents are counted by the second."""
        tally = self._tallies[number]
        tally.seconds += seconds
        if number in self._keys:
            return
        tally.documents += 1
        tally.characters += len(before)
        if after is not None:
            tally.kept += 1
            tally.kept_characters += len(after)
            tally.edited += after is not before

    def _drop(self, number: int, drop: Drop, document: Document, before: str) -> None:
        place = f"{document.source}:{document.line}"
        self._tallies[number].drop(drop.reason, drop.detail, place, before)
        if self._settings.save_dropped:
            stage = self._settings.stages[number].name
            why = {"stage": stage, "reason": drop.reason, "detail": drop.detail, "source": document.source}
            self._dropped.append(json_line({"text": before, **why, "line": document.line}))

    def _set_aside(self, number: int | str, stage: str, error: Exception, document: Document, text: str) -> None:
        what = {"text": text, "stage": stage, "error": f"{type(error).__name__}: {error}"}
        self._tallies[number].set_aside(what["error"], f"{document.source}:{document.line}", text)
        self._quarantined.append(json_line(what | {"source": document.source, "line": document.line}))

    def _line(self, document: Document) -> bytes:
        if self._pass.is_last:
            return json_line({"text": document.text, **self._settings.kept(document.metadata)})
        return json_line([document.text, document.metadata, document.source, document.line, document.is_page])

    def write(self, path: Path, crc: int) -> None:
        """Publish the unit's file."""
        form = self._settings.output_format if self._pass.is_last else _BETWEEN
        sections = {"documents": packed(self._lines, form)}
        shapes = {}
        for number, rows in self._keys.items():
            none = np.empty((0, self._settings.stages[number].keys), np.uint64)
            stacked = np.concatenate([none, *rows])
            shapes[number] = stacked.shape
            sections[f"keys-{number}"] = stacked.tobytes()
            sections[f"rows-{number}"] = np.array([len(some) for some in rows], np.uint32).tobytes()
        sections["dropped"] = packed(self._dropped, _BETWEEN)
        sections["quarantine"] = b"".join(self._quarantined)
        head = {
            "job": self._settings.job,
            "documents": len(self._lines),
            "input_crc32": crc,
            "shapes": shapes,
            "tallies": {str(name): tally.plain() for name, tally in self._tallies.items()},
        }
        write_unit(path, head, sections)
