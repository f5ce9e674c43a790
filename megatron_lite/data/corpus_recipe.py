"""The refinery before the tokenizer: a corpus goes through a recipe, and what is kept becomes tokens."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.data.corpus_job import CorpusJob, InputUnfit
from megatron_lite.data.refine.job import RefineJob, documents_folder, refine, remove_documents
from megatron_lite.data.refine.recipe import plain_recipe, read_recipe
from megatron_lite.data.refine.report import JSON_NAME, PAGE_NAME
from megatron_lite.data.text_input import Source, find_sources
from megatron_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Refined:
    """What a recipe left of a corpus: the files to tokenize, what was read of the job's inputs, and its facts."""

    sources: list[Source]
    inputs: list[dict[str, Any]]
    facts: dict[str, Any]


class CorpusRecipe:
    """The recipe of a job. Its report and what it leaves for the tokenizer are in PREFIX.refine.

    Raises ConfigError, all problems at once, for a recipe that cannot be.
    """

    def __init__(self, job: CorpusJob):
        self._job = job
        self._folder = Path(f"{job.output_prefix}.refine")
        fields = () if job.score_key is None else (job.score_key, job.score_key.partition(".")[0])
        self._refine_job = RefineJob(
            inputs=job.inputs,
            output=str(self._folder),
            stages=read_recipe(job.recipe, job.recipe_changes),
            format=job.format,
            txt_documents=job.txt_documents,
            text_key=job.json_keys[0],
            keep_metadata=fields,
            limit=job.limit,
            workers=job.workers,
            max_memory=job.max_memory,
            longest_document=job.longest_document,
            log_interval=job.log_interval,
            not_read=job.own_paths,
        )
        if problems := self._refine_job.problems():
            raise ConfigError(problems)

    @functools.cached_property
    def plain(self) -> list[dict[str, Any]]:
        """Stages and options, as JSON has them."""
        return plain_recipe(self._refine_job.stages)

    def refined(self, anew: bool) -> Refined:
        """Do what is left of the recipe, or all of it `anew`. Raises InputUnfit if it keeps nothing."""
        output, documents = self._folder, documents_folder(self._folder)
        # Without documents the folder is that of sets that are finished, and its report is theirs.
        anew = anew or ((output / JSON_NAME).is_file() and not documents.is_dir())
        report = refine(dataclasses.replace(self._refine_job, overwrite=anew))
        log.note(f"{self._job.recipe}: {report.summary()}; what was dropped and why is in {output / PAGE_NAME}")
        if not report.kept:
            self.clean()
            raise InputUnfit(
                f"the recipe {self._job.recipe} keeps none of {report.documents:,} documents; why is in "
                f"{output / PAGE_NAME}"
            )
        facts = {
            "name": self._job.recipe,
            "sha256": hashlib.sha256(json.dumps(self.plain, sort_keys=True).encode()).hexdigest(),
            "stages": self.plain,
            **{name: getattr(report, name) for name in ("documents", "kept", "dropped", "quarantined")},
        }
        return Refined(find_sources([str(documents)]), report.inputs, facts)

    def clean(self) -> None:
        """Leave the report alone of what was refined."""
        remove_documents(self._folder)
