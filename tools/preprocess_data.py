"""Turn text into the token sets that training reads: PREFIX_text_document.bin and .idx.

    python tools/preprocess_data.py --input corpus/*.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --append-eod --workers 8
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Literal, NoReturn

from megatron_lite import log
from megatron_lite.config.command_line import Repeated, read
from megatron_lite.config.data import DataConfig
from megatron_lite.config.megatron_flags import BY_NAME
from megatron_lite.config.tokenizer import TokenizerFiles
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.provenance import Provenance
from megatron_lite.data.text_blocks import parse_limit
from megatron_lite.data.text_input import TxtDocuments, format_problems
from megatron_lite.data.tokenize_corpus import CorpusRun
from megatron_lite.data.tokenizer_ladder import Engine
from megatron_lite.errors import EXIT_INTERRUPTED, MegatronLiteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions(TokenizerFiles):
    """Turn text into the token sets that training reads. Flags are Megatron's; dashes and underscores are alike."""

    input: tuple[str, ...]
    """Files, folders, patterns ("corpus/**/*.jsonl"), - for standard input, addresses (s3://, gs://, https://),
    hf:NAME:CONFIG:SPLIT or hf:FOLDER for Hugging Face data sets, source:NAME for a named one; .gz, .zst, .bz2 and .xz
    are unpacked."""
    output_prefix: str
    """Written are OUTPUT_PREFIX_KEY_document.bin, .idx and .manifest.json for each of --json-keys."""
    tokenizer_type: str
    """GPT2BPETokenizer, SentencePieceTokenizer, HuggingFaceTokenizer, TiktokenTokenizer or ByteTokenizer."""
    tokenizer_engine: Engine = "auto"
    """Library that encodes. auto: the fastest that is installed, can run this tokenizer, and gives its ids on hard
    texts and on some of the input. The output does not depend on it."""
    vocab_size: int | None = None
    """Write ids for a vocabulary of this size, which decides their width; default: the tokenizer's."""
    prepend_bos: bool = False
    """Begin each document with the begin-of-text token, as Megatron's Llama2Tokenizer does: that name implies it."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys (or dotted paths) of a JSON line or a row to take text from; each makes a token set of its own."""
    format: str = "auto"
    """jsonl, txt, html, parquet or warc, packed ones with .gz, .zst, .bz2 or .xz behind; auto: by the suffix, or
    jsonl."""
    txt_documents: TxtDocuments = "file"
    """What a document of plain text is; paragraphs are parted by blank lines."""
    recipe: str | None = None
    """Clean, filter and deduplicate before: web, code, books, none, or a YAML file of stages, as in
    tools/refine_data.py. What was dropped and why is in OUTPUT_PREFIX.refine/report.html."""
    set: Repeated[tuple[str, ...]] = ()
    """STAGE.OPTION=VALUE in place of the recipe's; may be given again and again."""
    shuffle_seed: int | None = None
    """Put the documents in an order that follows from this number; default: the order they are read in."""
    score_key: str | None = None
    """Key (or dotted path) of a number of each document, or a score that the recipe notes, to write as
    OUTPUT_PREFIX_KEY_document.scores.npy."""
    limit: str | None = None
    """Read this much at most, of all inputs together: 10000 documents, or 500MB or 2GiB of unpacked input."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a bad line (invalid JSON or UTF-8, no such key, not a string): stop, or leave it out and count it."""
    workers: int = 1
    """Processes that tokenize; the output does not depend on it."""
    max_memory_mb: int = 2048
    """MiB that the stages of --recipe, all processes together, or --shuffle-seed may take."""
    longest_document_mb: int = 8
    """MiB; longer documents are dropped by --recipe."""
    overwrite: bool = False
    """Begin anew, whatever an earlier run has left in OUTPUT_PREFIX.work."""
    log_interval: int = 10_000
    """Documents between progress lines where there is no terminal."""
    partitions: int = 1
    """Of Megatron; only 1: --workers share all files already, in order."""
    keep_sequential_samples: bool = False
    """Of Megatron; has no effect: the order is always kept."""
    dataset_impl: str = "mmap"
    """Of Megatron; only mmap."""
    split_sentences: bool = False
    """Of Megatron; refused: a GPT trains on whole documents."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = []
        for name in ("workers", "log_interval", "max_memory_mb", "longest_document_mb"):
            if getattr(self, name) < 1:
                found.append(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1; give 1 or more.")
        if not self.json_keys:
            found.append("--json-keys needs at least one key; the usual one is text.")
        found += format_problems(self.format)
        if repeated := {key for key in self.json_keys if self.json_keys.count(key) > 1}:
            found.append(f"--json-keys names {', '.join(sorted(repeated))} more than once; give each key once.")
        if self.tokenizer_type in BY_NAME["tokenizer_type"].refused_values:
            reason = BY_NAME["tokenizer_type"].refused_values[self.tokenizer_type]
            found.append(f"--tokenizer-type {self.tokenizer_type} is refused: {reason}.")
        if self.partitions != 1:
            found.append(f"--partitions {self.partitions} is refused: --workers share all files already, in order.")
        if self.set and self.recipe is None:
            found.append("--set changes a --recipe, and none is given.")
        if self.dataset_impl not in ("mmap", "infer"):
            found.append(f"--dataset-impl {self.dataset_impl} is refused: token sets are memory-mapped, leave it out.")
        if self.split_sentences:
            found.append("--split-sentences is refused: it is for BERT, a GPT trains on whole documents; leave it out.")
        return found

    def job(self) -> CorpusJob:
        """The work these options ask for; Megatron's names of tokenizers are understood."""
        tokenizer = DataConfig(
            tokenizer_type=BY_NAME["tokenizer_type"].values.get(self.tokenizer_type, self.tokenizer_type),
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(TokenizerFiles)},
        )
        own = {
            "inputs": self.input,
            "limit": parse_limit(self.limit),
            "tokenizer": tokenizer,
            "recipe_changes": self.set,
            "max_memory": self.max_memory_mb << 20,
            "longest_document": self.longest_document_mb << 20,
            "prepend_bos": self.prepend_bos or self.tokenizer_type == "Llama2Tokenizer",
        }
        shared = {field.name for field in dataclasses.fields(CorpusJob)} - {"block_bytes", "unit_bytes", *own}
        return CorpusJob(**own, **{name: getattr(self, name) for name in shared})


def _describe(prefix: str, facts: Provenance) -> str:
    return (
        f"{prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens of {facts.vocab_size:,} ids, "
        f"{facts.text_bytes:,} bytes of text = {facts.bytes_per_token:.3f} bytes a token; unigram entropy "
        f"{facts.unigram_entropy:.4f} nats a token, "
        f"{facts.unigram_entropy / math.log(2) / facts.bytes_per_token:.4f} bits a byte"
    )


def main(argv: Sequence[str] | None = None, keep: list[CorpusRun] | None = None) -> int:
    """Run the tool; returns its exit code. `keep` gets the run, for a caller that has no time to free its memory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = read(
            PreprocessOptions,
            sys.argv[1:] if argv is None else argv,
            prog="preprocess_data.py",
            description="Turn text into the token sets that training reads. Flags are Megatron's; dashes and "
            "underscores are alike.",
        )
        run = CorpusRun(options.job())
        if keep is not None:
            keep.append(run)
        for prefix, facts in run.made().items():
            print(_describe(prefix, facts))
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        log.note("stopped; no token set was written. The same command goes on from here, unless it reads a pipe")
        return EXIT_INTERRUPTED
    return 0


def _end(code: int) -> NoReturn:
    """End at once: Python would take the vocabulary apart first, which takes as long as megabytes of text."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as it is where the shell has closed it
                stream.flush()
    except OSError:
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    # A vocabulary is many objects that all stay: Python would look through them over and over while they are made, and
    # in workers, which would copy the memory that they share.
    gc.set_threshold(1 << 20)
    kept: list[CorpusRun] = []
    _end(main(keep=kept))
