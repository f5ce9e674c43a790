"""The interface all tokenizers share, and what they do alike: guarding special tokens, batches, windows."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson

from megatron_lite.data.tokenizer_engines import Encode
from megatron_lite.errors import TokenizerError

ROLE_NAMES: Mapping[str, tuple[str, ...]] = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
    "eod": ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>"),
    "pad": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
}
"""The special tokens that mean a role where the tokenizer's own files do not say, in order of preference."""


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """The ids of several texts; rows have equal length only if padding was asked for.

    `attention_mask` is 1 on a text's own tokens and 0 on padding.
    """

    ids: list[list[int]]
    attention_mask: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a longer token sequence: ids [start, start + len(ids)).

    The last `fresh` tokens were in no window before; over all windows they add up to the sequence.
    """

    start: int
    ids: list[int]
    fresh: int


def sliding_windows(ids: Sequence[int], max_length: int, stride: int) -> list[Window]:
    """The windows of `max_length` tokens that start every `stride` tokens and together cover `ids`.

    The last one ends where `ids` ends and may be shorter. Raises TokenizerError for a stride outside
    1 ... max_length, which would leave tokens out.
    """
    if not 1 <= stride <= max_length:
        raise TokenizerError(
            f"stride={stride} does not fit windows of max_length={max_length} tokens; choose 1 to {max_length}"
        )
    windows: list[Window] = []
    covered = 0
    while covered < len(ids):
        start = len(windows) * stride
        end = min(start + max_length, len(ids))
        windows.append(Window(start, list(ids[start:end]), end - covered))
        covered = end
    return windows


def _joined(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    if rows and isinstance(rows[0], np.ndarray):
        return np.concatenate(rows, dtype=np.int32, casting="same_kind"), lengths
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum())), lengths


_COMPARED_ONE_BY_ONE = 4
"""Ids; to look so few up in a table takes longer."""

MOST_IDS = 1 << 26
"""That a vocabulary may have, over a hundred times the largest in use."""


class Tokenizer(abc.ABC):
    """A mapping between text and token ids 0 ... vocab_size - 1.

    Text never becomes a special token: a literal "<|endoftext|>" in a document is encoded as the
    characters it consists of, whatever the kind. Special ids are put in by their number alone
    (`eod`, `token_to_id("<|endoftext|>")`). The id of unknown text, `unk`, is the one exception.

    A subclass hands its own special tokens and known roles to `__init__` and implements the five
    underscored methods for its own ids; tokens added later are kept here, after them.
    """

    kind: str
    library: str
    """What encodes its texts, unless `run_by` was given another one for blocks of them."""
    template: tuple[str, ...] = ()
    """Special tokens that the tokenizer's own files would put around every text; here nothing is put there."""

    def __init__(self, base_size: int, specials: Mapping[str, int], roles: Mapping[str, int | None]):
        if base_size > MOST_IDS:
            raise TokenizerError(
                f"the largest id of this {self.kind} is {base_size - 1:,}, and an embedding would have as many rows; "
                f"ids below {MOST_IDS:,} are possible: its file is damaged"
            )
        self._base_size = base_size
        self._vocab_size = base_size
        self._earlier: list[tuple[dict[str, int], int]] = []  # special tokens and size before each addition
        self._encode_block: Encode | None = None
        self._own_roles = {role: id for role, id in roles.items() if id is not None}
        self._specials = dict(specials)
        for role, id in self._own_roles.items():
            if role != "unk" and id not in self._specials.values():
                self._specials[str(self._base_token(id))] = id
        self._refresh()

    def engines(self) -> Mapping[str, Callable[[], Encode]]:
        """Faster libraries that may give the same ids, the fastest first, and what makes their encoders.

        That raises Unfit where a library cannot run this tokenizer, and whatever the library raises.
        """
        return {}

    def disorder(self) -> str | None:
        """Why those libraries would give other ids after all, as half a sentence; it takes a while to look for."""
        return None

    def run_by(self, encode: Encode | None) -> None:
        """Let `encode` do the work of `encode_block`; None: this tokenizer's own library."""
        self._encode_block = encode

    @abc.abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of each text, as the underlying library gives them, without any added by itself."""

    @abc.abstractmethod
    def _decode_ids(self, ids: list[int]) -> str:
        """Text of ids that are this kind's own and not special."""

    @abc.abstractmethod
    def _base_token(self, id: int) -> str | None:
        """Spelling of one of this kind's own ids, None where the vocabulary has a hole."""

    @abc.abstractmethod
    def _base_id(self, token: str) -> int | None:
        """The id of this kind's own token with that spelling."""

    @abc.abstractmethod
    def _content(self) -> Any:
        """All that decides which text becomes which ids, as JSON-able values, for the fingerprint."""

    def _refresh(self) -> None:
        """Derive roles and guards from the present special tokens."""
        self._roles: dict[str, int] = dict(self._own_roles)
        for role, names in ROLE_NAMES.items():
            found = next((self._specials[name] for name in names if name in self._specials), None)
            if found is not None:
                self._roles.setdefault(role, found)
        if "eos" in self._roles:
            self._roles.setdefault("eod", self._roles["eos"])
        if self._roles.get("unk") in [id for role, id in self._roles.items() if role != "unk"]:
            del self._roles["unk"]  # GPT-2's files call <|endoftext|> that too; its bytes spell everything
        self._special_of = {id: token for token, id in self._specials.items()}
        self._guarded = frozenset(self._special_of) - {self._roles.get("unk")}
        self._is_guarded = np.zeros(self._vocab_size, dtype=bool)
        self._is_guarded[list(self._guarded)] = True
        self._literals = re.compile(f"(?={'|'.join(re.escape(self._special_of[id]) for id in self._guarded)})")
        self._fingerprint: str | None = None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, special tokens included; never padded."""
        return self._vocab_size

    @property
    def bos(self) -> int | None:
        """The id that begins a text."""
        return self._roles.get("bos")

    @property
    def eos(self) -> int | None:
        """The id that ends a text."""
        return self._roles.get("eos")

    @property
    def eod(self) -> int | None:
        """The id that ends a document in a training set; eos where there is no other."""
        return self._roles.get("eod")

    @property
    def pad(self) -> int | None:
        """The id that fills a row."""
        return self._roles.get("pad")

    @property
    def unk(self) -> int | None:
        """The id of text that the vocabulary cannot spell."""
        return self._roles.get("unk")

    @property
    def special_tokens(self) -> dict[str, int]:
        """All special tokens and their ids."""
        return dict(self._specials)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of vocabulary, merges or scores, text rules and special tokens.

        Two tokenizers of one fingerprint map every text to the same ids; file names and formatting do
        not enter.
        """
        if self._fingerprint is None:
            self._fingerprint = self._fingerprint_with(self._specials, self._vocab_size)
        return self._fingerprint

    def understands(self, fingerprint: str) -> bool:
        """Whether ids of the tokenizer with that fingerprint mean the same here: it is this one, or this one before
        some of its special tokens were added."""
        return fingerprint == self.fingerprint or any(
            fingerprint == self._fingerprint_with(*earlier) for earlier in self._earlier
        )

    def _fingerprint_with(self, specials: Mapping[str, int], vocab_size: int) -> str:
        content = hashlib.sha256(orjson.dumps(self._content(), option=orjson.OPT_SORT_KEYS))
        content.update(json.dumps([specials, vocab_size], sort_keys=True).encode())
        return content.hexdigest()

    def add_special_tokens(self, tokens: Iterable[str]) -> int:
        """Make `tokens` special and return how many new ids that took.

        A token of the vocabulary keeps its id and becomes special; another gets the next free id.
        Raises TokenizerError for a token of fewer than two characters: it could not be told from text.
        """
        before = self._vocab_size
        for token in tokens:
            if len(token) < 2:
                raise TokenizerError(f"special token {token!r} is too short; it needs at least 2 characters")
            if token in self._specials:
                continue
            self._earlier.append((dict(self._specials), self._vocab_size))
            known = self._base_id(token)
            self._specials[token] = self._vocab_size if known is None else known
            self._vocab_size += known is None
        self._refresh()
        return self._vocab_size - before

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling (byte-level vocabularies spell a space as "Ġ")."""
        return self._specials[token] if token in self._specials else self._base_id(token)

    def id_to_token(self, id: int) -> str | None:
        """The spelling of an id, None where the vocabulary has a hole."""
        self._check_range([id])
        return self._special_of[id] if id in self._special_of else self._base_token(id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special id among them."""
        ids = np.asarray(self._own_ids([text])[0]).tolist()
        if self._guarded.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise TokenizerError(f"{self.kind} can spell {text!r} only by a special token; use another vocabulary")
        # The library took a spelled-out token for the token itself. Cut each literal behind its first
        # character; where normalisation made the literal, halve the text until it falls apart.
        # A literal of one character at the end leaves nothing to cut off behind it.
        behind = (match.start() + 1 for match in self._literals.finditer(text))
        cuts = [cut for cut in behind if cut < len(text)] or [len(text) // 2]
        pieces = (text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))
        return [id for piece in pieces if piece for id in self.encode(piece)]

    def encode_block(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end (int32) and the number of ids of each (int64): the fast path."""
        rows = self._own_ids(texts, self._encode_block)
        flat, lengths = _joined(rows)
        if self._has_guarded(flat):
            flat, lengths = _joined([self.encode(text) for text in texts])
        return flat, lengths

    def _has_guarded(self, ids: np.ndarray) -> bool:
        if len(self._guarded) <= _COMPARED_ONE_BY_ONE:
            return any((ids == id).any() for id in self._guarded)
        return bool(self._is_guarded[ids].any())

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, an int32 array each."""
        flat, lengths = self.encode_block(texts)
        return np.split(flat, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_batch(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        truncation: bool = False,
        padding: Literal[False, "longest", "max_length"] = False,
        padding_side: Literal["right", "left"] = "right",
    ) -> EncodedBatch:
        """Ids of several texts, cut to `max_length` with `truncation`, filled up with `padding`.

        Padding takes `pad`, or `eod` where there is no pad: the mask tells them apart. Raises
        TokenizerError if a text is longer than `max_length` and may not be cut, or no id can pad.
        """
        if max_length is None and (truncation or padding == "max_length"):
            raise TokenizerError("truncation and padding to a length need max_length, which was not given")
        rows = [row.tolist() for row in self.encode_ordinary_batch(texts)]
        for index, row in enumerate(rows):
            if max_length is not None and len(row) > max_length:
                if not truncation:
                    raise TokenizerError(
                        f"text {index} has {len(row)} tokens, more than max_length={max_length}; "
                        f"allow truncation, or give max_length={len(row)} or more"
                    )
                del row[max_length:]
        if not padding:
            return EncodedBatch(rows, [[1] * len(row) for row in rows])
        fill = self.eod if self.pad is None else self.pad
        if fill is None:
            raise TokenizerError(
                f"{self.kind} has neither a pad nor an eod token; add one with --special-tokens '<pad>'"
            )
        width = max_length if padding == "max_length" else max(map(len, rows), default=0)
        ids, masks = [], []
        for row in rows:
            filler = width - len(row)
            if padding_side == "right":
                ids.append(row + [fill] * filler)
                masks.append([1] * len(row) + [0] * filler)
            else:
                ids.append([fill] * filler + row)
                masks.append([0] * filler + [1] * len(row))
        return EncodedBatch(ids, masks)

    def encode_windows(self, text: str, max_length: int, stride: int) -> list[Window]:
        """A long text as overlapping windows; see `sliding_windows`."""
        return sliding_windows(self.encode(text), max_length, stride)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, an unused id becomes nothing.

        Special tokens are left out, or spelled out with `skip_special=False`. Raises TokenizerError
        for an id beyond the vocabulary.
        """
        ids = [int(id) for id in ids]
        self._check_range(ids)
        ids = [id for id in ids if id in self._special_of or self._base_token(id) is not None]
        if skip_special:
            return self._decode_ids([id for id in ids if id not in self._special_of])
        parts = []
        for special, group in itertools.groupby(ids, key=self._special_of.__contains__):
            run = list(group)
            parts.append("".join(map(self._special_of.__getitem__, run)) if special else self._decode_ids(run))
        return "".join(parts)

    def _own_ids(self, texts: Sequence[str], encode: Encode | None = None) -> list[Sequence[int]]:
        try:
            return (encode or self._encode_texts)(texts)
        except (UnicodeEncodeError, TypeError, RuntimeError):
            for index, text in enumerate(texts):
                surrogate = re.search("[\ud800-\udfff]", text)
                if surrogate:
                    raise TokenizerError(
                        f"text {index} has a lone surrogate, U+{ord(surrogate[0]):04X}, at character "
                        f"{surrogate.start()}: no UTF-8 stands for it; decode the text with errors='replace'"
                    ) from None
            raise

    def _check_range(self, ids: Iterable[int]) -> None:
        for id in ids:
            if not 0 <= id < self._vocab_size:
                raise TokenizerError(
                    f"token id {id} is outside this {self.kind}'s vocabulary, 0 to {self._vocab_size - 1}"
                )
