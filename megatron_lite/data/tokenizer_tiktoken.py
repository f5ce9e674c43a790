"""Byte-level BPE by ranks, run by `tiktoken`: .tiktoken rank files and Mistral's tekken.json."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from megatron_lite.data.byte_alphabet import spell_bytes, unspell_bytes
from megatron_lite.data.tokenizer_engines import GPT2_PATTERN, Encode, Unfit, gigatoken_of_ranks
from megatron_lite.data.tokenizer_interface import MOST_IDS, Tokenizer
from megatron_lite.errors import TokenizerError

_ENGLISH = r"'(?i:[sdmt]|ll|ve|re)"
_ANY_CASE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_NO_CAPITAL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

PATTERNS: Mapping[str, str] = {
    "r50k": GPT2_PATTERN,
    "cl100k": (rf"{_ENGLISH}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "o200k": (
        rf"{_LEAD}{_ANY_CASE}*{_NO_CAPITAL}+{_SUFFIX}|{_LEAD}{_ANY_CASE}+{_NO_CAPITAL}*{_SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How text is cut before merging. r50k is GPT-2, cl100k GPT-3.5 and 4, o200k GPT-4o."""

SPECIALS: Mapping[str, Mapping[str, int]] = {
    "r50k": {"<|endoftext|>": 50256},
    "cl100k": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
}
"""The special tokens that belong to the rank files of these names."""

_NAME_OF_SIZE = {50256: "r50k", 100256: "cl100k", 199998: "o200k"}
_TEKKEN_NAMES = {0: "<unk>", 1: "<s>", 2: "</s>", 11: "<pad>"}


_PROBE = "Word 12!\n"


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE that merges the pair of lowest rank first.

    `ranks` maps token bytes to ranks; the id of a token is `offset` + rank. Special tokens have ids
    of their own, outside the ranks. Ids may have holes.
    """

    kind = "TiktokenTokenizer"
    library = "tiktoken"

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], source: str, offset: int = 0
    ):
        if wrong := [rank for rank in ranks.values() if type(rank) is not int or not 0 <= rank < MOST_IDS]:
            raise TokenizerError(f"{source} gives a token the rank {wrong[0]!r:.60}; ranks are 0 to {MOST_IDS - 1:,}")
        if b"" in ranks:
            raise TokenizerError(f"{source} has a token without a byte; give an intact file")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise TokenizerError(
                f"{source} has no token for {len(missing)} of the 256 bytes, the first 0x{missing[0]:02x}; "
                "such ranks cannot spell every text, give a complete file"
            )
        token_of = {rank + offset: token for token, rank in ranks.items()}
        if len(token_of) != len(ranks):
            raise TokenizerError(
                f"{source} gives {len(ranks) - len(token_of)} ranks to two tokens; give an intact file"
            )
        try:
            self._library = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
            self._library.encode(_PROBE)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library panics where a pattern finds a piece of no character
            raise TokenizerError(
                f"--tiktoken-pattern {pattern!r} is neither one of {', '.join(PATTERNS)} nor a regular expression "
                f"that cuts text into pieces: {error}"
            ) from None
        self._ranks, self._token_of, self._pattern, self._offset = ranks, token_of, pattern, offset
        super().__init__(max([*token_of, *specials.values()]) + 1, specials, {})

    @classmethod
    def from_path(cls, path: Path, pattern: str | None = None) -> TiktokenTokenizer:
        """Load a rank file (base64 token and rank a line) or a tekken.json.

        `pattern` is a name of `PATTERNS` or a regular expression; by default the number of ranks tells.
        """
        data = path.read_bytes()
        if data[:1] == b"{":
            return cls._from_tekken(data, path)
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise TokenizerError(
                    f"{path}, line {number}: {line[:40]!r} is not a base64 token and a rank; give a .tiktoken rank file"
                ) from None
        name = _NAME_OF_SIZE.get(len(ranks)) if pattern is None else pattern
        if name is None:
            raise TokenizerError(
                f"{path} has {len(ranks):,} ranks, which is none of the known files; say how text is cut by "
                f"--tiktoken-pattern: {', '.join(PATTERNS)} or a regular expression"
            )
        last = max(ranks.values(), default=0)
        specials = SPECIALS[name] if _NAME_OF_SIZE.get(len(ranks)) == name else {"<|endoftext|>": last + 1}
        return cls(ranks, PATTERNS.get(name, name), specials, str(path))

    @classmethod
    def _from_tekken(cls, data: bytes, path: Path) -> TiktokenTokenizer:
        try:
            content = json.loads(data)
            settings = content["config"]
            offset = settings["default_num_special_tokens"]
            vocab = content["vocab"][: settings["default_vocab_size"] - offset]
            ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in vocab}
            names = _TEKKEN_NAMES | {entry["rank"]: entry["token_str"] for entry in content.get("special_tokens") or ()}
            pattern = settings["pattern"]
            if not (type(offset) is int and 0 <= offset < MOST_IDS and isinstance(pattern, str)):
                raise ValueError("config")
            if not all(type(rank) is int and isinstance(name, str) for rank, name in names.items()):
                raise ValueError("special_tokens")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TokenizerError(f"{path} is JSON, but not a tekken.json: {error!r} is wrong or missing") from None
        specials = {names.get(rank, f"<SPECIAL_{rank}>"): rank for rank in range(offset)}
        return cls(ranks, pattern, specials, str(path), offset)

    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        rows = [self._library.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return [row + self._offset for row in rows] if self._offset else rows

    def engines(self) -> Mapping[str, Callable[[], Encode]]:
        return {"gigatoken": self._gigatoken}

    def _gigatoken(self) -> Encode:
        scheme = next((name for name, pattern in PATTERNS.items() if pattern == self._pattern), None)
        if scheme is None:
            raise Unfit(f"it cuts text by none of {', '.join(PATTERNS)}")
        encode = gigatoken_of_ranks(self._ranks, scheme)
        return (lambda texts: [row + self._offset for row in encode(texts)]) if self._offset else encode

    def _decode_ids(self, ids: list[int]) -> str:
        return b"".join(map(self._token_of.__getitem__, ids)).decode(errors="replace")

    def _base_token(self, id: int) -> str | None:
        token = self._token_of.get(id)
        return None if token is None else spell_bytes(token)

    def _base_id(self, token: str) -> int | None:
        rank = self._ranks.get(unspell_bytes(token))
        return None if rank is None else rank + self._offset

    def _content(self) -> Any:
        ranks = [[rank, token.hex()] for token, rank in sorted(self._ranks.items(), key=lambda item: item[1])]
        return {"ranks": ranks, "pattern": self._pattern, "offset": self._offset}
