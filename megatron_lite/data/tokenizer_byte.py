"""The tokenizer without a vocabulary file: bytes are tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_lite.data.tokenizer_interface import Tokenizer


def _byte_alphabet() -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = {byte: chr(0x100 + rank) for rank, byte in enumerate(b for b in range(256) if b not in printable)}
    return "".join(shifted.get(byte, chr(byte)) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
"""The printable character that spells each byte in byte-level vocabularies (GPT-2)."""

_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}


def spell_bytes(data: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    return "".join(map(BYTE_ALPHABET.__getitem__, data))


def unspell_bytes(token: str) -> bytes | None:
    """The bytes behind such a spelling; None for characters outside the alphabet."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then <|endoftext|> (256) and <|pad|> (257)."""

    kind = "ByteTokenizer"

    def __init__(self) -> None:
        super().__init__(258, {"<|endoftext|>": 256, "<|pad|>": 257}, {})

    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def _decode_ids(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _base_token(self, id: int) -> str | None:
        return BYTE_ALPHABET[id] if id < 256 else None

    def _base_id(self, token: str) -> int | None:
        return _BYTE_OF.get(token)

    def _content(self) -> Any:
        return "bytes"
