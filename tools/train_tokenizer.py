"""Learn a tokenizer from text: byte-level BPE (tokenizer.json) or SentencePiece (tokenizer.model).

python tools/train_tokenizer.py --input corpus/*.jsonl.zst --type bpe --vocab-size 32000 --output tokenizer/
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.data import DataConfig
from megatron_lite.data.text_blocks import parse_limit
from megatron_lite.data.text_input import find_sources, format_problems, warn_of_pages
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_training import TrainingText, bytes_per_token, train_bpe, train_sentencepiece
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
    """How SentencePiece chooses pieces; it holds all text in memory."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens besides <|endoftext|> (bpe) or <s> and </s> (sentencepiece)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys (or dotted paths) of a JSON line or a row to take text from."""
    format: str = "auto"
    """jsonl, txt, html, parquet or warc, packed ones with .gz, .zst, .bz2 or .xz behind; auto: by the suffix, or
    jsonl."""
    limit: str | None = None
    """Read this much at most, of all inputs together: 10000 documents, or 500MB or 2GiB of unpacked input."""
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
    limit = parse_limit(options.limit)
    sources = find_sources(options.input, options.format)
    warn_of_pages(sources)
    with contextlib.closing(TextProgress(sources, options.log_interval)) as progress:
        text = TrainingText(sources, options.json_keys, progress, skip_bad=options.on_error == "skip", limit=limit)
        if options.type == "bpe":
            terminal = sys.stderr.isatty()
            content = train_bpe(text, options.vocab_size, options.special_tokens, terminal).encode()
        else:
            content = train_sentencepiece(text, options.vocab_size, options.special_tokens, options.sentencepiece_model)
    log.note(progress.summary())
    if text.skipped:
        log.warn(f"skipped {text.skipped:,} bad documents")
    if not text.trained_bytes:
        raise DataError(f"there is no text in {', '.join(options.input)}; nothing was written")
    tokenizer = _opened(options, content)
    with _written_to(options.path):
        publish(options.path, content)
    if tokenizer.vocab_size < options.vocab_size:
        log.warn(
            f"the text repeats too little for {options.vocab_size:,} ids: the vocabulary has "
            f"{tokenizer.vocab_size:,}; train on more text for more"
        )
    if text.held_out:
        print(
            f"{bytes_per_token(tokenizer, text.held_out):.3f} bytes a token on {len(text.held_out):,} held-out pieces"
        )
    else:
        log.warn("there is too little text to hold some out and measure on")
    print(
        f"{options.path}: {tokenizer.vocab_size:,} ids; use it by --tokenizer-type {TOKENIZER_TYPES[options.type]} "
        f"--tokenizer-model {options.path}"
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
        if problems := options.problems():
            raise ConfigError(problems)
        train(options)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
