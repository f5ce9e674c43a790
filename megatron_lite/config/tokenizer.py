"""The files of a tokenizer, named alike wherever text becomes ids or ids become text."""

from __future__ import annotations

import dataclasses
from typing import Literal

TokenizerType = Literal[
    "GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer", "TiktokenTokenizer", "ByteTokenizer"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a tokenizer of some --tokenizer-type is read from."""

    vocab_file: str | None = None
    """GPT2BPETokenizer: encoder.json (token to id)."""
    merge_file: str | None = None
    """GPT2BPETokenizer: vocab.bpe (merges)."""
    tokenizer_model: str | None = None
    """SentencePiece .model, Hugging Face tokenizer.json (or its folder), or tiktoken rank file."""
    tiktoken_pattern: str | None = None
    """Split pattern of TiktokenTokenizer: r50k, cl100k, o200k or a regular expression; default: by the file."""
    special_tokens: tuple[str, ...] = ()
    """User-defined special tokens, added after the tokenizer's own."""
