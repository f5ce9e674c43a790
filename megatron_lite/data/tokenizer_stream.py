"""Text out of tokens that arrive one at a time."""

from __future__ import annotations

from megatron_lite.data.tokenizer_interface import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_UNFINISHED = 3
"""Bytes of a UTF-8 character that still lacks its last one; decoders show it as one U+FFFD, or one a byte."""


class StreamDecoder:
    """The text of a growing token sequence, handed out as soon as no later token can change it.

    All pieces and `finish()` joined are `tokenizer.decode(ids)`, also for bytes that never become
    UTF-8. A token costs the decoding of the few tokens since the last complete character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._told = 0  # characters of the window's text that were handed out

    def push(self, id: int) -> str:
        """The text that becomes certain with one more token; may be empty."""
        self._window.append(id)
        text = self._decode(self._window)
        doubtful = min(len(text) - len(text.rstrip(_REPLACEMENT)), _LONGEST_UNFINISHED)
        certain = max(self._told, len(text) - doubtful)
        piece = text[self._told : certain]
        self._told = certain
        if not doubtful:
            self._shorten()
        return piece

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        piece = self._decode(self._window)[self._told :]
        self._window, self._told = [], 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _shorten(self) -> None:
        # One token of context stays: decoders that strip a text's first space must not take the next
        # token for the first. Blank context would not do, they may strip that as well.
        text = self._decode(self._window[-1:])
        if text.strip() and _REPLACEMENT not in text:
            self._window, self._told = self._window[-1:], len(text)
