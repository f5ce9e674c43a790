"""The vocabulary of a run: its tokenizer, and how many ids there are. No torch."""

from __future__ import annotations

from megatron_lite import log
from megatron_lite.config import huggingface
from megatron_lite.config.run import RunConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError


def resolve_vocabulary(config: RunConfig) -> tuple[Tokenizer | None, int]:
    """The tokenizer, if one is named, and the true vocabulary size: the flag's, or the tokenizer's.

    A Hugging Face folder's own grows by the tokens its tokenizer has added. Raises ConfigError when the tokenizer has
    more ids than --vocab-size.
    """
    tokenizer = build_tokenizer(config.data) if config.data.tokenizer_type else None
    given = config.model.vocab_size
    if tokenizer is None:
        if given is None:
            raise ConfigError("the vocabulary size is not known: give --tokenizer-type and its file, or --vocab-size")
        return None, given
    if given is not None and given < tokenizer.vocab_size:
        folder = config.checkpoint.load_hf
        if folder is not None and given == huggingface.read_config(folder).model.vocab_size:
            log.note(
                f"the tokenizer has {tokenizer.vocab_size} ids and {folder} {given}: the model grows by the others"
            )
            return tokenizer, tokenizer.vocab_size
        raise ConfigError(
            f"vocab_size={given} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"leave --vocab-size out, or give at least {tokenizer.vocab_size}"
        )
    return tokenizer, given or tokenizer.vocab_size
