"""How byte-level vocabularies spell bytes as text."""

from __future__ import annotations


def _byte_alphabet() -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = {byte: chr(0x100 + rank) for rank, byte in enumerate(b for b in range(256) if b not in printable)}
    return "".join(shifted.get(byte, chr(byte)) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
"""The printable character that spells each byte in byte-level vocabularies (GPT-2)."""

BYTE_OF = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}
"""The byte of each of these characters."""


def spell_bytes(data: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    return "".join(map(BYTE_ALPHABET.__getitem__, data))


def unspell_bytes(token: str) -> bytes | None:
    """The bytes behind such a spelling; None for characters outside the alphabet."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return None
