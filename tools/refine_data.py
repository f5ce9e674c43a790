"""Raw text of any kind to clean, filtered and deduplicated JSON lines, with a report of what was dropped and why.

    python tools/refine_data.py --input "crawl/*.warc.gz" --recipe web --output data/clean --workers 8

Killed anywhere and run again, it goes on where it was; the output is the same, whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import sys
import typing
from collections.abc import Sequence

from megatron_lite import log
from megatron_lite.config.command_line import Repeated, read
from megatron_lite.data.refine.job import RefineJob, refine
from megatron_lite.data.refine.output import OutputFormat
from megatron_lite.data.refine.recipe import STAGES, read_recipe
from megatron_lite.data.refine.stage import Stage
from megatron_lite.data.text_blocks import parse_limit
from megatron_lite.data.text_input import TxtDocuments, format_problems
from megatron_lite.errors import EXIT_INTERRUPTED, ConfigError, MegatronLiteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Clean, filter and deduplicate text. Dashes and underscores in flags are alike."""

    input: tuple[str, ...]
    """Files, folders, patterns ("crawl/**/*.warc.gz"), - for standard input, addresses (s3://, gs://, https://),
    hf:NAME:CONFIG:SPLIT or hf:FOLDER for Hugging Face data sets, source:NAME for a named one; .gz, .zst, .bz2 and .xz
    are unpacked."""
    output: str
    """Folder to write: documents/*.jsonl.zst, report.json, report.html."""
    recipe: str
    """web, code, books, none, or a YAML file of stages."""
    set: Repeated[tuple[str, ...]] = ()
    """STAGE.OPTION=VALUE in place of the recipe's, as in gopher_quality.min_words=30; may be given again and again."""
    format: str = "auto"
    """jsonl, txt, html, parquet or warc, packed ones with .gz, .zst, .bz2 or .xz behind; auto: by the suffix, or
    jsonl."""
    txt_documents: TxtDocuments = "file"
    """What a document of plain text is; paragraphs are parted by blank lines."""
    text_key: str = "text"
    """Key, or dotted path of keys, of a document's text."""
    keep_metadata: tuple[str, ...] = ()
    """Fields to carry to the output, those that stages note among them (language, score); all: every one."""
    limit: str | None = None
    """Read this much at most, of all inputs together: 10000 documents, or 500MB or 2GiB of unpacked input."""
    output_format: OutputFormat = "jsonl.zst"
    shard_mb: int = 256
    """MiB after which a file of documents is closed and the next begun."""
    save_dropped: bool = False
    """Write dropped.jsonl.zst too: all that was dropped, with stage and reason."""
    workers: int = 1
    """Processes; the output does not depend on it."""
    max_memory_mb: int = 2048
    """MiB that all processes together may take; more lets comparisons over the corpus take fewer rounds on disk."""
    longest_document_mb: int = 8
    """MiB; longer documents are dropped."""
    overwrite: bool = False
    """Throw away what --output holds of another job, or of this one, and begin anew."""
    log_interval: int = 10_000
    """Documents between progress lines where there is no terminal."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = [
            f"--{name.replace('_', '-')} {getattr(self, name)} is below 1; give 1 or more."
            for name in ("workers", "shard_mb", "max_memory_mb", "longest_document_mb", "log_interval")
            if getattr(self, name) < 1
        ]
        return found + format_problems(self.format)

    def job(self) -> RefineJob:
        """The work these options ask for. Raises ConfigError."""
        shared = {field.name for field in dataclasses.fields(RefineJob)} & {
            field.name for field in dataclasses.fields(self)
        }
        return RefineJob(
            inputs=self.input,
            stages=read_recipe(self.recipe, self.set),
            limit=parse_limit(self.limit),
            shard_bytes=self.shard_mb << 20,
            max_memory=self.max_memory_mb << 20,
            longest_document=self.longest_document_mb << 20,
            **{name: getattr(self, name) for name in shared - {"limit"}},
        )


def describe_stages() -> str:
    """All stages with their options and defaults."""
    return "\n\n".join(_describe(stage) for stage in STAGES.values())


def _describe(stage: type[Stage]) -> str:
    lines = [stage.name, *(f"    {line}" for line in inspect.cleandoc(stage.__doc__).splitlines())]
    hints = typing.get_type_hints(stage)
    for field in dataclasses.fields(stage):
        hint = hints[field.name]
        kind = getattr(hint, "__name__", None) or str(hint)
        if typing.get_origin(hint) is typing.Literal:
            kind = " or ".join(map(repr, typing.get_args(hint)))
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        lines.append(f"    - {field.name}: {kind.replace('typing.', '')} = {default!r}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--list-stages" in argv:
        print(describe_stages())
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.append(os.getcwd())  # where a recipe's own functions are looked for
    try:
        options = read(
            RefineOptions,
            argv,
            prog="refine_data.py",
            description="Clean, filter and deduplicate text. Dashes and underscores in flags are alike. --list-stages "
            "shows what recipes are made of.",
        )
        job = options.job()
        if problems := job.problems():
            raise ConfigError(problems)
        report = refine(job)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        log.note("stopped; the same command goes on from here")
        return EXIT_INTERRUPTED
    print(report.summary())
    print(f"{job.output}: documents in documents/, what was dropped and why in report.html and report.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
