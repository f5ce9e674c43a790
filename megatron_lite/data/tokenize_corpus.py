"""Text to token sets: units of the input are encoded by worker processes, kept until all are done, and put together.

Units that are done lie in PREFIX.work, so that a killed run goes on. When the last one is, they are put end to end or
shuffled, and the sets are published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite import log
from megatron_lite.data.corpus_job import TEXT_KEY, CorpusJob, InputUnfit
from megatron_lite.data.indexed import IndexedReader, paths
from megatron_lite.data.input_ledger import InputLedger
from megatron_lite.data.ordered_workers import map_in_order
from megatron_lite.data.provenance import Provenance, manifest_path, read_provenance
from megatron_lite.data.text_blocks import NO_LIMIT, Limit, limited, read_blocks
from megatron_lite.data.text_documents import texts_of
from megatron_lite.data.text_input import Source, find_sources
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.token_assembly import assemble
from megatron_lite.data.tokenize_units import TokenUnit, UnitTokenizer, crc_of, grouped
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_ladder import WITHOUT_THREADS, Ladder
from megatron_lite.data.unit_file import finished_unit, unit_path
from megatron_lite.data.work_folder import begin, claimed, clear, digest_of, job_facts, read_note
from megatron_lite.errors import DataError
from megatron_lite.publish import publish

if TYPE_CHECKING:
    from megatron_lite.data.corpus_recipe import CorpusRecipe

FORMAT = 1
"""Of the work folder."""


def tokenize_corpus(job: CorpusJob) -> dict[str, Provenance]:
    """Write the token sets of a job, or what is left of it, and return the facts of each by its prefix.

    Memory does not grow with the corpus. All files are published at the end. Raises InputUnfit for a bad document,
    naming file and line, after which nothing is left, and DataError for a lost worker or a full disk, after which the
    same job goes on.
    """
    run = _Run(job)
    with claimed(run.work, str(run.work)):
        run.begin()
        made = run.known()
        try:
            if made is None:
                made = run.assembled(run.units())
        except InputUnfit:
            clear(run.work)
            raise
        except BaseException:
            if not run.can_go_on:
                run.clean()
            raise
        run.clean()
    return made


class _Run:
    """One run of a job: what it is to make, how far it is, and what tells it from other jobs."""

    def __init__(self, job: CorpusJob):
        self._job = job
        self._tokenizer = build_tokenizer(job.tokenizer)
        self._ladder = Ladder(self._tokenizer, job.tokenizer_engine)
        self._vocab_size = job.ids_for(self._tokenizer)
        self._sources = find_sources(job.inputs, job.format, job.txt_documents, job.own_paths)
        job.check_sources(self._sources)
        self._recipe = _recipe(job)
        self._facts = self._stated()
        self._digest = digest_of(self._facts)
        self.work = Path(f"{job.output_prefix}.work")
        self.can_go_on = all(source.is_repeatable for source in self._sources)

    def _stated(self) -> dict[str, Any]:
        """What decides the output."""
        job = self._job
        options = ("json_keys", "score_key", "shuffle_seed", "prepend_bos", "append_eod", "on_error")
        facts = job_facts(
            self._sources,
            format=FORMAT,
            tokenizer=self._tokenizer.fingerprint,
            vocab_size=self._vocab_size,
            limit=dataclasses.asdict(job.limit),
            cut=[job.block_bytes, job.unit_bytes],
            recipe=self._recipe and [self._recipe.plain, job.longest_document],
            **{name: getattr(job, name) for name in options},
        )
        return json.loads(json.dumps(facts))

    def known(self) -> dict[str, Provenance] | None:
        """The facts of the sets, if this very job has made all of them of files that are here to be compared."""
        if self._job.overwrite or any(source.size is None for source in self._sources):
            return None
        found = {}
        for prefix in self._job.prefixes:
            if not all(path.exists() for path in (manifest_path(prefix), *paths(prefix))):
                return None
            facts = read_provenance(prefix)
            if facts is None or facts.job != self._digest:
                return None
            try:
                if IndexedReader(prefix).num_tokens != facts.tokens:
                    return None
            except DataError as error:
                log.note(f"{error}. It is made again")
                return None
            found[prefix] = facts
        log.note(f"{', '.join(found)}: made by the same job already; --overwrite makes it again")
        return found

    def begin(self) -> None:
        """Claim the work folder for this job, with what is done of it. Raises DataError if it has another's."""
        if not self.can_go_on:
            log.note("what comes through a pipe cannot be read again: a run that is killed has to begin anew")
        if begin(self.work, self._facts, str(self.work), self._job.overwrite, self.can_go_on):
            log.note(f"the job that {self.work} is of goes on")

    def units(self) -> _Units:
        """All units, those that are left made."""
        done, folder = self.work / "units.json", self.work / "units"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            publish(done, json.dumps(self._make_units(folder)))
        count, inputs, recipe = read_note(done, list)
        return _Units([unit_path(folder, number) for number in range(count)], inputs, recipe)

    def _make_units(self, folder: Path) -> tuple[int, list[dict[str, Any]], dict[str, Any] | None]:
        """How many there are, what was read of sources for them, and what the recipe did."""
        job, ledger = self._job, InputLedger()
        if self._recipe is None:
            count = self._tokenize(self._sources, job.json_keys, job.limit, ledger, folder)
            return count, ledger.entries(), None
        refined = self._recipe.refined(job.overwrite or not self.can_go_on)
        count = self._tokenize(refined.sources, (TEXT_KEY,), NO_LIMIT, ledger, folder)
        return count, refined.inputs, refined.facts

    def _tokenize(
        self, sources: Sequence[Source], keys: Sequence[str], limit: Limit, ledger: InputLedger, folder: Path
    ) -> int:
        job = self._job
        fields = keys if job.score_key is None else (*keys, job.score_key)
        blocks = limited(
            itertools.chain.from_iterable(read_blocks(source, job.block_bytes, fields) for source in sources), limit
        )
        first = list(itertools.islice(blocks, 1))
        blocks = itertools.chain(first, blocks)
        engine = self._ladder.climb(texts_of(first, keys))
        count = 0

        def left() -> Iterator[TokenUnit]:
            nonlocal count
            for group in grouped(ledger.watch(blocks), job.unit_bytes):
                path = unit_path(folder, count)
                count += 1
                if (unit := finished_unit(path, self._digest)) is None:
                    yield TokenUnit(path, group)
                elif unit.head["input_crc32"] != crc_of(group):
                    raise DataError(
                        f"{group[0].source.place(group[0].first_line)}: the input is not what it was when {self.work} "
                        "was begun; --overwrite begins anew"
                    )

        work = UnitTokenizer(job, self._digest, keys, self._vocab_size, engine, self._tokenizer)
        make = functools.partial(functools.partial, work)
        with (
            contextlib.closing(TextProgress(sources, job.log_interval)) as progress,
            contextlib.closing(map_in_order(make, left(), job.workers, engine in WITHOUT_THREADS)) as outcomes,
        ):
            for outcome in outcomes:
                if outcome.bad is not None:
                    source, bad = outcome.bad
                    raise InputUnfit(
                        f"{source.place(bad.line)}: {bad.reason}: {bad.detail}. Mend it, or leave such documents out "
                        "and count them by --on-error skip"
                    )
                progress.add(outcome.read, outcome.documents, outcome.text_bytes, outcome.tokens)
        log.note(progress.summary())
        return count

    def assembled(self, units: _Units) -> dict[str, Provenance]:
        """Publish the sets and their facts."""
        more = {"inputs": units.inputs, "recipe": units.recipe, "job": self._digest}
        return assemble(self._job, self._tokenizer, self._vocab_size, units.paths, self.work, more)

    def clean(self) -> None:
        """Throw the work away, and leave what users look at."""
        clear(self.work)
        if self._recipe is not None:
            self._recipe.clean()


@dataclasses.dataclass(frozen=True)
class _Units:
    """The files of all units, and what was done to make them."""

    paths: list[Path]
    inputs: list[dict[str, Any]]
    recipe: dict[str, Any] | None


def _recipe(job: CorpusJob) -> CorpusRecipe | None:
    if job.recipe is None:
        return None
    # The refinery's stages take a while to load.
    from megatron_lite.data.corpus_recipe import CorpusRecipe

    return CorpusRecipe(job)
