"""What is scored: a run of tokens, cut into windows so that each but the first is predicted once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_lite import log
from megatron_lite.data.documents import TokenWindows
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import check_tokenizer, read_provenance
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Passage:
    """A run of tokens that is scored as a whole, and the text it stands for."""

    name: str
    num_tokens: int
    tokens: Callable[[int, int], np.ndarray]
    """Tokens [start, stop), of any integer dtype."""
    text_bytes: Callable[[int, int], int] | None = None
    """(part, parts) -> UTF-8 bytes in one of `parts` shares of the text that all tokens but the first
    stand for; None where the text is not known."""
    starts: Callable[[int, int], np.ndarray] | None = None
    """Where documents begin among tokens [start, stop), counted from `start`, which is the first of them; None where
    the tokens are one document."""

    def __post_init__(self) -> None:
        if self.num_tokens < 2:
            raise DataError(
                f"{self.name} has {self.num_tokens} tokens; scoring needs 2 or more, one to predict from and one to "
                f"predict"
            )


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of up to `length` inputs that start every `stride` tokens over `num_tokens` of them.

    Window i reads inputs from i x stride on and is asked for the tokens behind them; those that an
    earlier window was asked for already are only context. So each token but the first counts once,
    and behind the first window with at least `length` - `stride` tokens before it, as in Hugging
    Face's page on the perplexity of fixed-length models (there a window of `length` + 1). Where all
    tokens fit into one window it is as short as they are.

    Raises ConfigError for a stride outside 1 to `length`.
    """

    num_tokens: int
    length: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.length:
            raise ConfigError(
                f"stride={self.stride} is out of range: with windows of {self.length} tokens give 1 to {self.length}; "
                f"a longer stride would leave tokens out."
            )

    def __len__(self) -> int:
        return 1 + math.ceil(max(0, self.num_tokens - 1 - self.length) / self.stride)

    def read(self, passage: Passage, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of a window, int64 of equal length; a label that does not count is -1.

        The last window may end early: what is missing is filled with token 0.
        """
        start = window * self.stride
        stop = min(start + self.length, self.num_tokens - 1)
        both = passage.tokens(start, stop + 1).astype(np.int64)
        width = min(self.length, self.num_tokens - 1)
        tokens = np.zeros(width, np.int64)
        labels = np.full(width, -1, np.int64)
        tokens[: stop - start] = both[:-1]
        fresh = self.length - self.stride if window else 0
        labels[fresh : stop - start] = both[1 + fresh :]
        return tokens, labels

    def begins(self, passage: Passage, window: int) -> np.ndarray:
        """Where documents begin among the tokens of a window, bool."""
        found = np.zeros(min(self.length, self.num_tokens - 1), np.bool_)
        start = window * self.stride
        found[0] = True
        if passage.starts is not None:
            found[passage.starts(start, min(start + self.length, self.num_tokens - 1))] = True
        return found


def passage_of_documents(name: str, windows: TokenWindows, vocab_size: int, tokenizer: Tokenizer | None) -> Passage:
    """The tokens of some documents of a set.

    Bytes of text are those that preprocessing counted where all of the set is scored, else the documents
    are decoded. Raises DataError if the set was made with another tokenizer or leaves the vocabulary.
    """
    reader = windows.reader
    windows.check_vocabulary(vocab_size)
    facts = read_provenance(reader.prefix, reader.num_tokens)
    check_tokenizer(reader.prefix, facts, tokenizer)
    text_bytes = None
    if tokenizer is None:
        log.warn(f"{name}: bits per byte need a tokenizer, and the checkpoint names none")
    else:
        known = facts.text_bytes if facts is not None and windows.num_tokens == reader.num_tokens else None
        text_bytes = _DocumentBytes(windows, tokenizer, known)

    def tokens(start: int, stop: int) -> np.ndarray:
        return reader.tokens(windows.first_token + start, windows.first_token + stop)

    def starts(start: int, stop: int) -> np.ndarray:
        return reader.document_starts(windows.first_token + start, windows.first_token + stop)

    return Passage(name, windows.num_tokens, tokens, text_bytes, starts)


@dataclasses.dataclass(frozen=True)
class _DocumentBytes:
    """Bytes of text in documents, without those of their first token."""

    windows: TokenWindows
    tokenizer: Tokenizer
    known: int | None

    def __call__(self, part: int, parts: int) -> int:
        total = -self._decoded(0, 1) if part == 0 else 0
        if self.known is not None:
            return total + self.known if part == 0 else 0
        reader: IndexedReader = self.windows.reader
        offset = self.windows.first_token
        for document in range(self.windows.documents[0] + part, self.windows.documents[1], parts):
            total += self._decoded(
                reader.document_token(document) - offset, reader.document_token(document + 1) - offset
            )
        return total

    def _decoded(self, start: int, stop: int) -> int:
        offset = self.windows.first_token
        ids = self.windows.reader.tokens(offset + start, offset + stop)
        return len(self.tokenizer.decode(ids.tolist()).encode())


def passage_of_text(path: Path, tokenizer: Tokenizer) -> Passage:
    """A text file as one document: behind an end-of-document token, where there is one, all of it counts.

    Raises DataError for a file that cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    start = [] if tokenizer.eod is None else [tokenizer.eod]
    ids = np.array(start + tokenizer.encode(text), dtype=np.int64)
    counted = len(text.encode()) - len(tokenizer.decode(ids[:1].tolist()).encode())

    def tokens(first: int, stop: int) -> np.ndarray:
        return ids[first:stop]

    def text_bytes(part: int, parts: int) -> int:
        return counted if part == 0 else 0

    return Passage(str(path), len(ids), tokens, text_bytes)
