"""Learn a tokenizer from text: byte-level BPE (tokenizer.json) or SentencePiece (tokenizer.model).

python tools/train_tokenizer.py --input corpus/*.jsonl.zst --type bpe --vocab-size 32000 --output tokenizer/
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.data import DataConfig
from megatron_lite.data.known_vocabularies import KNOWN, known_vocabulary, vocabulary_at
from megatron_lite.data.text_blocks import parse_limit
from megatron_lite.data.text_input import find_sources, format_problems, warn_of_pages
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.text_sample import TextSample
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_training import (
    TrainingText,
    bytes_per_token,
    insist_on_size,
    train_bpe,
    train_sentencepiece,
)
from megatron_lite.errors import ConfigError, DataError, MegatronLiteError
from megatron_lite.publish import insist_on_place, publish

TOKENIZER_TYPES = {"bpe": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}
SUFFIXES = {"bpe": ".json", "sentencepiece": ".model"}


@dataclasses.dataclass(frozen=True)
class TrainTokenizerOptions:
    """Learn a tokenizer from text. Dashes and underscores in flags are alike."""

    input: tuple[str, ...]
    """Files, folders, patterns ("corpus/**/*.jsonl"), - for standard input, addresses (s3://, gs://, https://),
    hf:NAME:CONFIG:SPLIT or hf:FOLDER for Hugging Face data sets, source:NAME for a named one; .gz, .zst, .bz2 and .xz
    are unpacked."""
    vocab_size: int
    """Number of token ids, special tokens included."""
    output: str
    """File to write (.json for bpe, .model for sentencepiece), or folder for tokenizer.json / tokenizer.model."""
    type: Literal["bpe", "sentencepiece"] = "bpe"
    """bpe: byte-level, as GPT-2; sentencepiece: pieces of text with bytes for rare characters, as LLaMA."""
    sentencepiece_model: Literal["unigram", "bpe"] = "unigram"
    """How SentencePiece chooses pieces."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens besides <|endoftext|> (bpe) or <s> and </s> (sentencepiece)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys (or dotted paths) of a JSON line or a row to take text from."""
    format: str = "auto"
    """jsonl, txt, html, parquet or warc, packed ones with .gz, .zst, .bz2 or .xz behind; auto: by the suffix, or
    jsonl."""
    limit: str | None = None
    """Read this much at most, of all inputs together: 10000 documents, or 500MB or 2GiB of unpacked input."""
    sample_bytes: str = "500MB"
    """Learn from a uniform sample of this much of the text, which is held in memory; the same one each time."""
    compare_with: tuple[str, ...] = ("gpt2", "cl100k")
    """Vocabularies whose bytes per token on the held-out text are told as well: a name (gpt2, cl100k, o200k), where an
    installed package or tiktoken's cache has its file, or a tokenizer's file or folder."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a bad line (invalid JSON or UTF-8, no such key, not a string): stop, or leave it out and count it."""
    log_interval: int = 100_000
    """Documents between progress lines where there is no terminal."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = [
            f"--{name.replace('_', '-')} {getattr(self, name)} is below 1; give 1 or more."
            for name in ("vocab_size", "log_interval")
            if getattr(self, name) < 1
        ]
        if not self.json_keys:
            found.append("--json-keys needs at least one key; the usual one is text.")
        found += format_problems(self.format)
        for name in self.compare_with:
            if name not in KNOWN and not Path(name).exists():
                found.append(f"--compare-with {name} is neither {', '.join(KNOWN)} nor a file or folder that is there.")
        for token in self.special_tokens:
            if len(token) < 2:
                found.append(
                    f"--special-tokens has {token!r}, which could not be told from text; give 2 characters or more."
                )
        for kind, suffix in SUFFIXES.items():
            if kind != self.type and self.output.endswith(suffix):
                found.append(
                    f"--output {self.output} is the name of a {kind} tokenizer; --type {self.type} writes a "
                    f"{SUFFIXES[self.type]} file, or give a folder."
                )
        return found

    @property
    def path(self) -> Path:
        """The file that is written."""
        suffix = SUFFIXES[self.type]
        return Path(self.output) if self.output.endswith(suffix) else Path(self.output, f"tokenizer{suffix}")


def _opened(options: TrainTokenizerOptions, content: bytes) -> Tokenizer:
    """The tokenizer of a file's content, before anything is published."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, options.path.name)
        path.write_bytes(content)
        return build_tokenizer(DataConfig(tokenizer_type=TOKENIZER_TYPES[options.type], tokenizer_model=str(path)))


@contextlib.contextmanager
def _written_to(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"--output {path} cannot be written: {error.strerror}") from None


def train(options: TrainTokenizerOptions) -> None:
    """Read, learn, write, and say how well held-out text is packed."""
    with _written_to(options.path):
        insist_on_place(options.path)
    insist_on_size(options.type, options.vocab_size, options.special_tokens)
    others = dict(_known(options.compare_with))
    limit, most = parse_limit(options.limit), parse_limit(options.sample_bytes, "--sample-bytes").bytes
    if most is None:
        raise ConfigError(f"--sample-bytes {options.sample_bytes} is a number of documents; give bytes, as 500MB.")
    sources = find_sources(options.input, options.format)
    warn_of_pages(sources)
    with contextlib.closing(TextProgress(sources, options.log_interval)) as progress:
        text = TrainingText(sources, options.json_keys, progress, options.on_error == "skip", limit, most)
    log.note(progress.summary())
    if text.skipped:
        log.warn(f"skipped {text.skipped:,} bad documents")
    if not text.training.bytes:
        raise DataError(f"there is no text in {', '.join(options.input)}; nothing was written")
    if text.training.bytes < text.training.seen_bytes:
        log.note(
            f"learning from a sample of {text.training.bytes / 1e6:,.1f} MB of {text.training.seen_bytes / 1e6:,.1f}; "
            "--sample-bytes gives more"
        )
    if options.type == "bpe":
        content = train_bpe(text, options.vocab_size, options.special_tokens, sys.stderr.isatty()).encode()
    else:
        content = train_sentencepiece(text, options.vocab_size, options.special_tokens, options.sentencepiece_model)
    tokenizer = _opened(options, content)
    with _written_to(options.path):
        publish(options.path, content)
    if tokenizer.vocab_size < options.vocab_size:
        log.warn(
            f"the text repeats too little for {options.vocab_size:,} ids: the vocabulary has "
            f"{tokenizer.vocab_size:,}; train on more text for more"
        )
    if text.held_out:
        _compare(tokenizer, text.held_out, others)
    else:
        log.warn("there is too little text to hold some out and measure on")
    print(
        f"{options.path}: {tokenizer.vocab_size:,} ids; use it by --tokenizer-type {TOKENIZER_TYPES[options.type]} "
        f"--tokenizer-model {options.path}"
    )


def _known(names: Sequence[str]) -> Iterator[tuple[str, Tokenizer]]:
    """The tokenizers to compare with that are here, by their names."""
    for name in names:
        data = vocabulary_at(Path(name)) if Path(name).exists() else known_vocabulary(name)
        if data is None:
            log.note(f"no file of {name} is here to compare with; --compare-with FILE names one")
            continue
        yield name, build_tokenizer(data)


def _compare(tokenizer: Tokenizer, held_out: TextSample, others: Mapping[str, Tokenizer]) -> None:
    """Say how many bytes a token stands for, in this vocabulary and in others."""
    own = bytes_per_token(tokenizer, held_out)
    print(f"{own:.3f} bytes a token on {len(held_out):,} held-out pieces ({held_out.bytes / 1e6:,.1f} MB)")
    for name, other in others.items():
        theirs = bytes_per_token(other, held_out)
        print(
            f"{theirs:.3f} bytes a token by {name} ({other.vocab_size:,} ids), so that this one takes "
            f"{theirs / own:.3f} times its tokens"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    # The libraries answer no interrupt while they learn, and nothing is written before they are done.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        options = read(
            TrainTokenizerOptions,
            sys.argv[1:] if argv is None else argv,
            prog="train_tokenizer.py",
            description="Learn a tokenizer from text. Dashes and underscores in flags are alike.",
        )
        train(options)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
