"""The vocabulary of a run: its tokenizer, and how many ids there are. No torch."""

from __future__ import annotations

from megatron_lite.config.run import RunConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError


def resolve_vocabulary(config: RunConfig) -> tuple[Tokenizer | None, int]:
    """The tokenizer, if one is named, and the true vocabulary size: the flag's, or the tokenizer's.

    Raises ConfigError when the tokenizer has more ids than --vocab-size.
    """
    tokenizer = build_tokenizer(config.data) if config.data.tokenizer_type else None
    given = config.model.vocab_size
    if tokenizer is None:
        if given is None:
            raise ConfigError("the vocabulary size is not known: give --tokenizer-type and its file, or --vocab-size")
        return None, given
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size={given} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"leave --vocab-size out, or give at least {tokenizer.vocab_size}"
        )
    return tokenizer, given or tokenizer.vocab_size
