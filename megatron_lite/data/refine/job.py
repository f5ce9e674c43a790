"""A whole run of the refinery: units of the input through the passes of a recipe, by workers, again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite import log
from megatron_lite.data.input_ledger import InputLedger
from megatron_lite.data.ordered_workers import WorkerLost, map_in_order
from megatron_lite.data.refine.crashes import blame, read_crashes
from megatron_lite.data.refine.output import OutputFormat
from megatron_lite.data.refine.passes import ALL_METADATA, Pass, RefineSettings, Unit, UnitRefiner, Verdicts, plan
from megatron_lite.data.refine.recipe import plain_recipe
from megatron_lite.data.refine.report import JSON_NAME, PAGE_NAME, Report, gather
from megatron_lite.data.refine.stage import ABSENT, KEPT, CorpusStage, DocumentStage, Stage
from megatron_lite.data.text_blocks import NO_LIMIT, Limit, limited, read_blocks
from megatron_lite.data.text_input import STANDARD_INPUT, Source, TxtDocuments, find_sources
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.unit_file import finished_unit, open_unit, unit_path
from megatron_lite.data.work_folder import begin, claimed, clear, digest_of, insist_on_job, job_facts, read_note
from megatron_lite.errors import DataError
from megatron_lite.kernels.crc32 import crc32
from megatron_lite.publish import publish, published

FORMAT = 1
"""Of the work folder and of report.json."""
UNIT_BYTES = 4 << 20
LEAST_MEMORY = 160 << 20
_WORKER_MEMORY = 110 << 20
_BYTES_OF_A_BYTE = 12
"""What a worker holds for a byte of its longest document or unit: as read, as text, edited, in words, as written."""
_LEAST_SORTING = 16 << 20
_WORK = ".work"


@dataclasses.dataclass(frozen=True)
class RefineJob:
    """What is read, what is done to it, where it goes.

    In `output`: documents/00000.jsonl.zst, ... of about `shard_bytes` each, report.json and report.html,
    quarantine.jsonl if a stage failed on documents, dropped.jsonl.zst if `save_dropped`. Of the fields of a document
    and what stages note, `keep_metadata` is written beside the text ("all": all of it). Of folders and patterns among
    `inputs`, what lies in `output` or begins with one of `not_read` is left out.
    """

    inputs: tuple[str, ...]
    output: str
    stages: tuple[Stage, ...]
    format: str = "auto"
    txt_documents: TxtDocuments = "file"
    text_key: str = "text"
    keep_metadata: tuple[str, ...] = ()
    limit: Limit = NO_LIMIT
    output_format: OutputFormat = "jsonl.zst"
    shard_bytes: int = 256 << 20
    save_dropped: bool = False
    workers: int = 1
    max_memory: int = 2 << 30
    longest_document: int = 8 << 20
    overwrite: bool = False
    log_interval: int = 10_000
    unit_bytes: int = UNIT_BYTES
    not_read: tuple[str, ...] = ()

    def memory_needed(self) -> int:
        """Bytes that the workers asked for take at most, with the process that feeds them."""
        each = _BYTES_OF_A_BYTE * max(self.unit_bytes, self.longest_document)
        # One worker is this process itself.
        return LEAST_MEMORY + each * self.workers + (_WORKER_MEMORY * self.workers if self.workers > 1 else 0)

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        needed = self.memory_needed()
        if self.max_memory >= needed:
            return []
        return [
            f"--max-memory-mb {self.max_memory >> 20} is less than the {-(-needed >> 20):,} that --workers "
            f"{self.workers} may need with documents of up to {self.longest_document >> 20} MiB; give that, or fewer "
            "workers, or a smaller --longest-document-mb."
        ]


def refine(job: RefineJob) -> Report:
    """Do a job, or what is left of it, and return its report.

    Raises DataError for input that cannot be read, a folder that is not this job's, and a worker that is lost;
    whatever happens, the same job goes on where it was.
    """
    sources = find_sources(job.inputs, job.format, job.txt_documents, (f"{job.output}/", *job.not_read))
    output = Path(job.output)
    fingerprint = _fingerprint(job, sources)
    with _claimed(output, fingerprint, job.overwrite) as is_complete:
        if is_complete:
            log.note(f"{output} is complete already; nothing was done, --overwrite does it again")
            return Report.read(output)
        work = output / _WORK
        run = _Run(job, work, _settings(job, work, digest_of(fingerprint)))
        run.prepare()
        for this in plan(job.stages):
            run.do(this, sources)
        report = gather(job.stages, run.finished, fingerprint, run.inputs)
        _assemble(job, run.finished, output, work)
        report.write(output, work)
        clear(work)
        for failure in report.failures():
            log.warn(failure)
        return report


def _settings(job: RefineJob, work: Path, digest: str) -> RefineSettings:
    shared = ("stages", "text_key", "keep_metadata", "output_format", "save_dropped")
    return RefineSettings(prepared=work / "prepared", job=digest, **{name: getattr(job, name) for name in shared})


def _fingerprint(job: RefineJob, sources: Sequence[Source]) -> dict[str, Any]:
    """What decides the output: another job in the same folder is told by it."""
    options = ("text_key", "keep_metadata", "output_format", "shard_bytes", "save_dropped", "longest_document")
    facts = job_facts(
        sources,
        format=FORMAT,
        recipe=plain_recipe(job.stages),
        limit=dataclasses.asdict(job.limit),
        unit_bytes=job.unit_bytes,
        **{name: getattr(job, name) for name in options},
    )
    return json.loads(json.dumps(facts))


@contextlib.contextmanager
def _claimed(output: Path, fingerprint: dict[str, Any], overwrite: bool) -> Iterator[bool]:
    """The output folder, for this process alone and for this job; whether the job is done already. Raises DataError."""
    work, report = output / _WORK, output / JSON_NAME
    ours = work.is_dir() or report.is_file()
    is_new = not output.exists()
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file; give a folder")
    if output.is_dir() and not ours and any(output.iterdir()):
        raise DataError(f"--output {output} holds other files; give a folder that is empty or not there")
    try:
        with claimed(work, f"--output {output}"):
            if overwrite:
                # The report first: it says that all the others are there.
                for name in (JSON_NAME, PAGE_NAME, "quarantine.jsonl", "dropped.jsonl.zst"):
                    (output / name).unlink(missing_ok=True)
                remove_documents(output)
            elif report.is_file():
                insist_on_job(Report.read(output).job, fingerprint, f"--output {output}")
            begin(work, fingerprint, f"--output {output}", overwrite)
            is_complete = report.is_file() and documents_folder(output).is_dir()
            yield is_complete
            if is_complete:
                clear(work)
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                output.rmdir()


def remove_documents(output: str | os.PathLike) -> None:
    """Leave of a finished job its report and what was dropped or set aside."""
    shutil.rmtree(documents_folder(output), ignore_errors=True)


def documents_folder(output: str | os.PathLike) -> Path:
    """Where the documents of a job's output are."""
    return Path(output) / "documents"


class _Run:
    """The passes of a job as they are done; `finished` has the unit files of each, in order, `inputs` what was read."""

    def __init__(self, job: RefineJob, work: Path, settings: RefineSettings):
        self._job, self._work, self._settings = job, work, settings
        self._compared: dict[int, Path] = {}
        self.finished: list[list[Path]] = []
        self.inputs: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """What stages need ready, once."""
        done = self._work / "prepared.done"
        self._settings.prepared.mkdir(exist_ok=True)
        for stage in self._job.stages:
            if isinstance(stage, DocumentStage) and not done.exists():
                stage.prepare(self._settings.prepared)
        publish(done, b"")

    def do(self, this: Pass, sources: Sequence[Source]) -> None:
        """One pass over all units, or over those that are left, and the comparisons at its end."""
        folder = self._work / f"pass-{this.number}"
        folder.mkdir(exist_ok=True)
        done = folder / "done.json"
        if not done.exists():
            publish(done, json.dumps(self._refine_all(this, folder, sources)))
        count, inputs = read_note(done, list)
        self.finished.append([unit_path(folder, number) for number in range(count)])
        self.inputs += inputs
        self._compared = {}
        for number in this.sign:
            self._compared[number] = self._verdicts(number, folder)

    def _refine_all(self, this: Pass, folder: Path, sources: Sequence[Source]) -> tuple[int, list[dict[str, Any]]]:
        """All units, again after a document has killed its worker: that one is set aside. The number of units, and
        what was read of sources for them."""
        while True:
            ledger = InputLedger()
            units = self._of_last_pass(folder) if self.finished else self._of_input(folder, sources, ledger)
            try:
                return self._refine(this, units, sources), ledger.entries()
            except WorkerLost as lost:
                if not blame(folder, lost):
                    raise
                if not self.finished and any(source.path == STANDARD_INPUT for source in sources):
                    raise DataError(
                        f"a document killed a worker by signal {lost.signal_number}; give the same standard input "
                        "again: the document is set aside then"
                    ) from None
                log.warn(f"a document killed a worker by signal {lost.signal_number}; it is set aside")

    def _refine(self, this: Pass, units: Iterator[Unit | None], sources: Sequence[Source]) -> int:
        """The number of units, of which those given as None are done already."""
        count = 0

        def left() -> Iterator[Unit]:
            nonlocal count
            for unit in units:
                count += 1
                if unit is not None:
                    yield unit

        names = [self._job.stages[number].name for number in (*this.apply, *this.run, *this.sign)]
        log.note(f"pass {this.number + 1}: {', '.join(names) or 'reading and writing alone'}")
        make = functools.partial(UnitRefiner, self._settings, this)
        with (
            contextlib.closing(TextProgress([] if self.finished else sources, self._job.log_interval)) as progress,
            contextlib.closing(map_in_order(make, left(), self._job.workers)) as results,
        ):
            for read, documents, characters in results:
                progress.add(read, documents, characters)
        log.note(f"pass {this.number + 1}: {progress.summary()}")
        return count

    def _of_input(self, folder: Path, sources: Sequence[Source], ledger: InputLedger) -> Iterator[Unit | None]:
        job = self._job
        fields = None
        if ALL_METADATA not in job.keep_metadata:
            fields = (job.text_key, *job.keep_metadata, *(source.text_key for source in sources if source.text_key))
        blocks = itertools.chain.from_iterable(
            read_blocks(source, job.unit_bytes, fields, job.longest_document) for source in sources
        )
        crashes = read_crashes(folder)
        for number, block in enumerate(ledger.watch(limited(blocks, job.limit))):
            path = unit_path(folder, number)
            if (unit := finished_unit(path, self._settings.job)) is None:
                yield Unit(path, block, crashes=crashes.get(number, {}))
                continue
            if unit.head["input_crc32"] != crc32(block.data):
                raise DataError(
                    f"{block.source.place(block.first_line)}: the input is not what it was when {job.output} "
                    "was begun; --overwrite begins anew"
                )
            yield None

    def _of_last_pass(self, folder: Path) -> Iterator[Unit | None]:
        starts = dict.fromkeys(self._compared, 0)
        crashes = read_crashes(folder)
        for number, before in enumerate(self.finished[-1]):
            shapes = open_unit(before).head["shapes"]
            verdicts = []
            for stage, path in self._compared.items():
                rows = shapes[str(stage)][0]
                verdicts.append(Verdicts(stage, path, starts[stage], rows))
                starts[stage] += rows
            path = unit_path(folder, number)
            of_unit = crashes.get(number, {})
            is_done = finished_unit(path, self._settings.job) is not None
            yield None if is_done else Unit(path, before=before, verdicts=tuple(verdicts), crashes=of_unit)

    def _verdicts(self, number: int, folder: Path) -> Path:
        """The file of what a comparison has found, made first if it is not there."""
        path = folder / f"verdicts-{number}"
        if path.exists():
            return path
        stage, units = self._job.stages[number], self.finished[-1]
        assert isinstance(stage, CorpusStage)
        log.note(f"comparing all documents: {stage.name}")
        rows = sum(open_unit(unit).head["shapes"][str(number)][0] for unit in units)
        with published(path) as temporary:
            temporary.touch()
            if rows:
                verdicts = np.memmap(temporary, np.uint8, "w+", shape=rows)
                self._mark_absent(number, verdicts)
                load = [functools.partial(_keys, unit, number) for unit in units]
                stage.resolve(load, verdicts, folder, max(self._job.max_memory - LEAST_MEMORY, _LEAST_SORTING))
                verdicts.flush()
        return path

    def _mark_absent(self, number: int, verdicts: np.ndarray) -> None:
        """Rows of documents that comparisons before in the same pass have dropped; those have one row a document."""
        documents = row = 0
        earlier = [np.memmap(path, np.uint8, "r") for path in self._compared.values()]
        for unit in self.finished[-1] if earlier else []:
            counts = np.frombuffer(open_unit(unit).section(f"rows-{number}"), np.uint32)
            gone = np.zeros(len(counts), bool)
            for found in earlier:
                gone |= found[documents : documents + len(counts)] != KEPT
            absent = np.repeat(gone, counts)
            verdicts[row : row + len(absent)][absent] = ABSENT
            documents, row = documents + len(counts), row + len(absent)


def _keys(unit: Path, number: int) -> np.ndarray:
    opened = open_unit(unit)
    keys = np.frombuffer(opened.section(f"keys-{number}"), np.uint64)
    return keys.reshape(opened.head["shapes"][str(number)])


def _assemble(job: RefineJob, finished: Sequence[Sequence[Path]], output: Path, work: Path) -> None:
    """Put the pieces of all units end to end."""
    making = work / "documents"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    shards = 0
    pieces = (open_unit(unit).section("documents") for unit in finished[-1])
    while (piece := next(pieces, None)) is not None:
        with open(making / f"{shards:05d}.{job.output_format}", "wb") as shard:
            while piece is not None:
                shard.write(piece)
                if shard.tell() >= job.shard_bytes:
                    break
                piece = next(pieces, None)
            shard.flush()
            os.fsync(shard.fileno())
        shards += 1
    remove_documents(output)
    os.replace(making, documents_folder(output))
    for section, name in (("quarantine", "quarantine.jsonl"), ("dropped", "dropped.jsonl.zst")):
        with published(output / name, within=work) as temporary, open(temporary, "wb") as file:
            for units in finished:
                for unit in units:
                    file.write(open_unit(unit).section(section))
        if not (output / name).stat().st_size:
            (output / name).unlink()
