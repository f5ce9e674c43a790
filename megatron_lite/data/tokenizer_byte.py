"""The tokenizer without a vocabulary file: bytes are tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_lite.data.byte_alphabet import BYTE_ALPHABET, BYTE_OF
from megatron_lite.data.tokenizer_interface import Tokenizer


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then <|endoftext|> (256) and <|pad|> (257)."""

    kind = "ByteTokenizer"
    library = "numpy"

    def __init__(self) -> None:
        super().__init__(258, {"<|endoftext|>": 256, "<|pad|>": 257}, {})

    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def _decode_ids(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _base_token(self, id: int) -> str | None:
        return BYTE_ALPHABET[id] if id < 256 else None

    def _base_id(self, token: str) -> int | None:
        return BYTE_OF.get(token)

    def _content(self) -> Any:
        return "bytes"
