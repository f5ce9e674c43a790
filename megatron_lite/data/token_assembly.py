"""The units of a corpus put together: token sets, with the facts of each, published when all are whole."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.config.tokenizer import TokenizerFiles
from megatron_lite.data.corpus_job import CorpusJob, InputUnfit
from megatron_lite.data.provenance import Provenance
from megatron_lite.data.token_documents import TokenDocuments
from megatron_lite.data.token_set_writer import IdCounts, TokenSetWriter, token_set
from megatron_lite.data.token_shuffle import shuffled
from megatron_lite.data.tokenize_units import unit_counts, unit_documents
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.unit_file import UnitFile, open_unit
from megatron_lite.publish import interrupts_awaited

_EXAMPLES = 3
"""Places named for each kind of skipped document."""
_MOST_SHUFFLED = 256 << 20
"""Bytes. More make a shuffle no faster."""


class _Totals:
    """What all units together have."""

    def __init__(self, keys: int, vocab_size: int):
        self.documents = 0
        self.text_bytes = [0] * keys
        self.id_bytes = [0] * keys
        self.counts = [IdCounts(vocab_size) for _ in range(keys)]
        self.skipped: collections.Counter[str] = collections.Counter()
        self._places: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, unit: UnitFile) -> None:
        self.documents += unit.head["documents"]
        for key, ids in enumerate(self.counts):
            self.text_bytes[key] += unit.head["text_bytes"][key]
            self.id_bytes[key] += unit.size(f"ids-{key}")
            ids.counts += unit_counts(unit, key)
        for source, line, reason in unit.head["bad"]:
            self.skipped[reason] += 1
            if self.skipped[reason] <= _EXAMPLES:
                self._places[reason].append(f"{source}:{line}")

    def insist_on_text(self, job: CorpusJob) -> None:
        """Raise InputUnfit if a set would have no token."""
        for prefix, size in zip(job.prefixes, self.id_bytes, strict=True):
            if not size:
                found = f"; {self._describe_skipped()}" if self.skipped else ""
                raise InputUnfit(
                    f"there is no text for {prefix} in {', '.join(job.inputs)}{found}; nothing was written"
                )

    def warn_of_skipped(self) -> None:
        """Say what was left out, if anything was."""
        if self.skipped:
            log.warn(self._describe_skipped())

    def _describe_skipped(self) -> str:
        parts = []
        for reason, count in self.skipped.most_common():
            more = ", ..." if count > _EXAMPLES else ""
            parts.append(f"{count:,} {reason} ({', '.join(self._places[reason])}{more})")
        return f"skipped {self.skipped.total():,} bad documents: " + "; ".join(parts)


def assemble(
    job: CorpusJob,
    tokenizer: Tokenizer,
    vocab_size: int,
    units: Iterable[Path],
    work: Path,
    more: Callable[[], Mapping[str, Any]],
) -> dict[str, Provenance]:
    """Publish the token sets of a job out of its units, and return the facts of each by its prefix.

    Where documents keep their order, each unit is put to the others as soon as `units` gives it. `more` tells at the
    end what units do not. Raises InputUnfit if there is no text.
    """
    totals = _Totals(len(job.json_keys), vocab_size)
    _remove_leftovers(work)
    with contextlib.ExitStack() as publishing:
        if job.shuffle_seed is None and job.score_key is None:
            sets = [publishing.enter_context(token_set(prefix, vocab_size, within=work)) for prefix in job.prefixes]
            for unit in map(open_unit, units):
                totals.add(unit)
                for key, made in enumerate(sets):
                    _append(made, unit_documents(unit, key, made.dtype))
            totals.insist_on_text(job)
        else:
            units = list(units)
            for path in units:
                totals.add(open_unit(path))
            totals.insist_on_text(job)
            scored = None if job.score_key is None else totals.documents
            sets = []
            for key, prefix in enumerate(job.prefixes):
                made = publishing.enter_context(token_set(prefix, vocab_size, scored=scored, within=work))
                batches = (unit_documents(open_unit(path), key, made.dtype) for path in units)
                if job.shuffle_seed is not None:
                    memory = min(job.max_memory // 2, _MOST_SHUFFLED)
                    batches = shuffled(batches, job.shuffle_seed, totals.id_bytes[key], memory, work / f"shuffle-{key}")
                for batch in batches:
                    _append(made, batch)
                sets.append(made)
        totals.warn_of_skipped()
        shared = _shared_facts(job, tokenizer) | {"skipped": dict(totals.skipped), **more()}
        for made in sets:
            made.finish()
        with interrupts_awaited():  # one that comes now is too late: the sets appear together
            publishing.close()
            return {
                prefix: made.describe(
                    text_bytes=totals.text_bytes[key], unigram_entropy=totals.counts[key].entropy(), **shared
                )
                for key, (prefix, made) in enumerate(zip(job.prefixes, sets, strict=True))
            }


def _append(made: TokenSetWriter, batch: TokenDocuments) -> None:
    # Megatron writes a document without tokens as one without sequences.
    filled = batch.lengths > 0
    made.add(batch.ids, batch.lengths[filled], filled, batch.scores)


def _remove_leftovers(work: Path) -> None:
    """What a run that was killed before it published has left: the folder is held, so nobody else is at it."""
    for path in work.glob("*.tmp"):
        path.unlink()


def _shared_facts(job: CorpusJob, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is so of all sets of a job."""
    given = {field.name: getattr(job.tokenizer, field.name) for field in dataclasses.fields(TokenizerFiles)}
    return {
        "tokenizer_type": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer": {name: value for name, value in given.items() if value},
        "vocab_size": tokenizer.vocab_size,
        **{name: getattr(job, name) for name in ("append_eod", "prepend_bos", "shuffle_seed", "score_key")},
    }
