"""Text to token sets: units of the input are encoded by worker processes and put together.

Units that are done lie in PREFIX.work until all are, so that a killed run goes on. They are put end to end as they
come, or shuffled when the last one is there; then the sets are published.
"""

from __future__ import annotations

import collections
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
from megatron_lite.data.ordered_workers import IN_FLIGHT, map_in_order
from megatron_lite.data.provenance import Provenance, manifest_path, read_provenance
from megatron_lite.data.text_blocks import NO_LIMIT, Limit, limited, read_blocks, to_send
from megatron_lite.data.text_documents import texts_of
from megatron_lite.data.text_input import Source, find_sources
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.token_assembly import assemble
from megatron_lite.data.tokenize_units import TokenUnit, UnitTokenizer, crc_of, grouped
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_ladder import WITHOUT_THREADS, Ladder
from megatron_lite.data.unit_file import finished_unit, unit_path
from megatron_lite.data.work_folder import begin, claimed, clear, digest_of, job_facts, read_note, state
from megatron_lite.errors import DataError
from megatron_lite.publish import published

if TYPE_CHECKING:
    from megatron_lite.data.corpus_recipe import CorpusRecipe

FORMAT = 1
"""Of the work folder."""


def tokenize_corpus(job: CorpusJob) -> dict[str, Provenance]:
    """Write the token sets of a job, or what is left of it, as `CorpusRun` does."""
    return CorpusRun(job).made()


class _Slipped(Exception):
    """A library that encoded the first units turned out to give other ids: they are thrown away."""


class CorpusRun:
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
        self._work = Path(f"{job.output_prefix}.work")
        self._done = self._work / "units.json"
        self._goes_on = False
        """Whether units are kept for another run: those of an earlier one, or those of a library that was checked."""
        self._can_go_on = all(source.is_repeatable for source in self._sources)

    def made(self) -> dict[str, Provenance]:
        """Write the token sets of the job, or what is left of it, and return the facts of each by its prefix.

        Memory does not grow with the corpus. All files are published at the end. Raises InputUnfit for a bad document,
        naming file and line, after which nothing is left, and DataError for a lost worker or a full disk, after which
        the same job goes on.
        """
        with claimed(self._work, str(self._work)):
            self._begin()
            made = self._known()
            try:
                while made is None:
                    try:
                        made = self._assembled()
                    except _Slipped:
                        clear(self._work)
            except InputUnfit:
                clear(self._work)
                raise
            except BaseException:
                if not self._can_go_on:
                    self._clean()
                elif not self._goes_on:
                    clear(self._work)
                raise
            self._clean()
        return made

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

    def _known(self) -> dict[str, Provenance] | None:
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

    def _begin(self) -> None:
        """Claim the work folder for this job, with what is done of it. Raises DataError if it has another's."""
        if not self._can_go_on:
            log.note("what comes through a pipe cannot be read again: a run that is killed has to begin anew")
        self._goes_on = begin(
            self._work, self._facts, str(self._work), self._job.overwrite, self._can_go_on, stated_now=False
        )
        if self._goes_on:
            log.note(f"the job that {self._work} is of goes on")

    def _assembled(self) -> dict[str, Provenance]:
        """Publish the sets and their facts, all units made that are left."""
        with contextlib.closing(self._units()) as units:
            return assemble(self._job, self._tokenizer, self._vocab_size, units, self._work, self._more)

    def _more(self) -> dict[str, Any]:
        """The facts that the units do not tell, when there are all."""
        _, inputs, recipe = read_note(self._done, list)
        return {"inputs": inputs, "recipe": recipe, "job": self._digest}

    def _units(self) -> Iterator[Path]:
        """The files of all units in order, those that are left made meanwhile; when they are, `_done` says so."""
        folder = self._work / "units"
        if self._done.exists():
            count, *_ = read_note(self._done, list)
            yield from (unit_path(folder, number) for number in range(count))
            return
        folder.mkdir(exist_ok=True)
        job, ledger, refined = self._job, InputLedger(), None
        count = 0
        if self._recipe is None:
            made = self._tokenize(self._sources, job.json_keys, job.limit, ledger, folder)
        else:
            refined = self._recipe.refined(job.overwrite or not self._can_go_on)
            made = self._tokenize(refined.sources, (TEXT_KEY,), NO_LIMIT, ledger, folder)
        with contextlib.closing(made):
            for path in made:
                count += 1
                yield path
        inputs, facts = (refined.inputs, refined.facts) if refined else (ledger.entries(), None)
        with published(self._done, synced=False) as temporary:  # as the units are
            temporary.write_text(json.dumps([count, inputs, facts]))

    def _tokenize(
        self, sources: Sequence[Source], keys: Sequence[str], limit: Limit, ledger: InputLedger, folder: Path
    ) -> Iterator[Path]:
        job = self._job
        fields = keys if job.score_key is None else (*keys, job.score_key)
        blocks = limited(
            itertools.chain.from_iterable(read_blocks(source, job.block_bytes, fields) for source in sources), limit
        )
        first = list(itertools.islice(blocks, 1))
        blocks = itertools.chain(first, blocks)
        sample = texts_of(first, keys)
        # What was read of a pipe is gone, and units of an earlier run are kept with new ones: there, no doubtful ones.
        begins_unchecked = self._can_go_on and not self._goes_on
        if begins_unchecked and job.workers > 1:
            self._ladder.prepare(sample)
        engine = self._ladder.stand() if begins_unchecked else self._ladder.climb(sample)
        paths: collections.deque[Path] = collections.deque()

        def left() -> Iterator[TokenUnit]:
            for number, group in enumerate(grouped(ledger.watch(blocks), job.unit_bytes)):
                if number == IN_FLIGHT * job.workers:
                    self._check(sample)
                path = unit_path(folder, number)
                paths.append(path)
                if (unit := finished_unit(path, self._digest)) is None:
                    yield TokenUnit(path, group if job.workers == 1 else tuple(map(to_send, group)))
                elif unit.head["input_crc32"] != crc_of(group):
                    raise DataError(
                        f"{group[0].source.place(group[0].first_line)}: the input is not what it was when {self._work} "
                        "was begun; --overwrite begins anew"
                    )
            self._check(sample)

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
                while paths[0] != outcome.path:
                    yield paths.popleft()
                yield paths.popleft()
        yield from paths
        log.note(progress.summary())

    def _check(self, sample: Sequence[str]) -> None:
        """Try the library that encodes, once, while the workers have their first units, and keep units from now on.

        Raises _Slipped if it is not to encode.
        """
        if self._goes_on:
            return
        if self._can_go_on and not self._ladder.check(sample):
            raise _Slipped
        state(self._work, self._facts)
        self._goes_on = True

    def _clean(self) -> None:
        """Throw the work away, and leave what users look at."""
        clear(self._work)
        if self._recipe is not None:
            self._recipe.clean()


def _recipe(job: CorpusJob) -> CorpusRecipe | None:
    if job.recipe is None:
        return None
    # The refinery's stages take a while to load.
    from megatron_lite.data.corpus_recipe import CorpusRecipe

    return CorpusRecipe(job)
