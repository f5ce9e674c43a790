"""What a run of preprocessing is asked for: what is read, how it becomes tokens, and where they go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from megatron_lite import log
from megatron_lite.config.data import DataConfig
from megatron_lite.data.indexed import MOST_IDS
from megatron_lite.data.text_blocks import BLOCK_BYTES, NO_LIMIT, Limit
from megatron_lite.data.text_input import KEYLESS, Source, TxtDocuments, warn_of_pages
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_ladder import Engine
from megatron_lite.errors import ConfigError, DataError, TokenizerError

UNIT_BYTES = 2 << 20
TEXT_KEY = "text"
"""Where documents of the refinery have their text."""


class InputUnfit(DataError):
    """Input that only its owner can mend. What was made of it so far is thrown away."""


@dataclasses.dataclass(frozen=True)
class CorpusJob:
    """What is read, how it is tokenized and where it goes.

    A document gives one token set for each of `json_keys`, `{output_prefix}_{key}_document`. With
    `on_error` "skip" a bad document is left out of all of them and counted. `recipe` (a preset or a file of the
    refinery's, changed as `recipe_changes` say) comes before; `shuffle_seed` puts documents in an order of its own;
    `score_key` makes a column of numbers of that field. `max_memory` is for the recipe's stages and the shuffle.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: DataConfig
    json_keys: tuple[str, ...] = ("text",)
    format: str = "auto"
    txt_documents: TxtDocuments = "file"
    limit: Limit = NO_LIMIT
    recipe: str | None = None
    recipe_changes: tuple[str, ...] = ()
    score_key: str | None = None
    shuffle_seed: int | None = None
    prepend_bos: bool = False
    append_eod: bool = False
    vocab_size: int | None = None
    tokenizer_engine: Engine = "auto"
    workers: int = 1
    max_memory: int = 2 << 30
    longest_document: int = 8 << 20
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    log_interval: int = 10_000
    block_bytes: int = BLOCK_BYTES
    unit_bytes: int = UNIT_BYTES

    def prefix(self, key: str) -> str:
        """The token set of a key, named as Megatron names it."""
        return f"{self.output_prefix}_{key}_document"

    @property
    def own_paths(self) -> tuple[str, ...]:
        """How the paths begin that a run of the job writes."""
        sets = (f"{path}." for path in self.prefixes)
        return (*sets, f"{self.output_prefix}.work/", f"{self.output_prefix}.refine/")

    @property
    def prefixes(self) -> list[str]:
        """The token sets of all keys."""
        return [self.prefix(key) for key in self.json_keys]

    def ids_for(self, tokenizer: Tokenizer) -> int:
        """The vocabulary size that files are written for. Raises TokenizerError if the tokenizer cannot do the job."""
        if self.append_eod and tokenizer.eod is None:
            raise TokenizerError(
                f"--append-eod: this {tokenizer.kind} has no token that ends a document; add one by "
                "--special-tokens '<|endoftext|>', here and in training"
            )
        if self.prepend_bos and tokenizer.bos is None:
            raise TokenizerError(
                f"--prepend-bos: this {tokenizer.kind} has no token that begins a text; add one by --special-tokens "
                "'<s>', here and in training"
            )
        if tokenizer.template and not self.prepend_bos:
            log.note(
                f"this {tokenizer.kind} would put {' '.join(tokenizer.template)} around a text, as Megatron lets it; "
                "documents are written without, --prepend-bos begins each with its begin-of-text token"
            )
        if self.vocab_size is not None and self.vocab_size < tokenizer.vocab_size:
            raise TokenizerError(
                f"--vocab-size {self.vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; "
                "leave it out or give at least that"
            )
        if self.vocab_size is not None and self.vocab_size > MOST_IDS:
            raise TokenizerError(
                f"--vocab-size {self.vocab_size:,} is more than {MOST_IDS:,} ids; leave it out or give at most that"
            )
        return self.vocab_size or tokenizer.vocab_size

    def check_sources(self, sources: Sequence[Source]) -> None:
        """Raise DataError if the job cannot be done with these inputs; say what is doubtful of them."""
        plain = next((source.name for source in sources if source.documents in KEYLESS), None)
        if plain is not None and len(self.json_keys) > 1:
            raise DataError(f"--json-keys {' '.join(self.json_keys)}: {plain} has no keys; give one")
        if plain is not None and self.score_key is not None and self.recipe is None:
            raise DataError(
                f"--score-key {self.score_key}: {plain} has no keys; leave it out, or note a score by --recipe"
            )
        if self.recipe is None:
            warn_of_pages(sources)
        elif len(self.json_keys) > 1:
            raise ConfigError(
                f"--recipe works on one text a document, and --json-keys names {len(self.json_keys)}; give one"
            )
        if not self.append_eod:
            log.note("documents run into one another unmarked; --append-eod ends each with a token")
