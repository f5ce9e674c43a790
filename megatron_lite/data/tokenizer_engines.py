"""The libraries that run a byte-level BPE, each behind the same function: texts in, an array of ids for each out."""

from __future__ import annotations

import base64
import itertools
import json
import mmap
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_lite.data.byte_alphabet import BYTE_ALPHABET, unspell_bytes

Encode = Callable[[Sequence[str]], list[np.ndarray]]

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CACHE_BYTES = 96 << 20
_CACHED_CHARACTERS = 1 << 25
"""Text whose words are cached at most where the system does not say how much memory that took."""


class Unfit(Exception):
    """Why a library cannot run a tokenizer, as half a sentence."""


class _Gigatoken:
    """An encoder by gigatoken. It is made anew when its cache of words has grown large: the library sets no bound."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._encode = make().encode
        self._before: int | None = None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._before is None:
            self._before, self._characters = _resident_bytes(), 0
        grown = (_resident_bytes() or self._before) - self._before
        if grown > _CACHE_BYTES or (self._before == 0 and self._characters > _CACHED_CHARACTERS):
            self._encode = self._make().encode
            self._before, self._characters = _resident_bytes(), 0
        self._characters += sum(map(len, texts))
        return list(map(self._encode, texts))


def _resident_bytes() -> int:
    """Memory that this process has; 0 where the system has no such file."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def gigatoken_of_ranks(ranks: Mapping[bytes, int], scheme: str) -> Encode:
    """gigatoken for ranks 0 ... n - 1, cutting text by the scheme it knows by that name."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in ordered] != list(range(len(ordered))):
        raise Unfit("its ranks have holes")
    lines = b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ordered))

    def make() -> Any:
        from gigatoken import Tokenizer

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ranks.tiktoken")
            path.write_bytes(lines)
            return Tokenizer.from_tiktoken(path, scheme, {}).backend

    return _Gigatoken(make)


def gigatoken_of_description(description: Mapping[str, Any]) -> Encode:
    """gigatoken for a tokenizer.json that `require_byte_level` has nothing against."""
    content = {
        "model": description["model"],
        "normalizer": description.get("normalizer"),
        "pre_tokenizer": description["pre_tokenizer"],
        # It looks for special tokens in texts and for no others; ours are those that are no text.
        "added_tokens": [token | {"special": True} for token in tokens_in_text(description)],
    }
    text = orjson.dumps(content)

    def make() -> Any:
        from gigatoken import Tokenizer

        return Tokenizer.from_json(text).backend

    return _Gigatoken(make)


def tiktoken_of_description(description: Mapping[str, Any]) -> Encode:
    """tiktoken for a tokenizer.json that `require_byte_level` has nothing against.

    It merges whatever pair spells the token of lowest rank, not listed pairs: the same where each token comes of one
    pair and is what its own bytes merge to.
    """
    import tiktoken

    model = description["model"]
    if tokens_in_text(description) or description.get("normalizer") or model.get("ignore_merges"):
        raise Unfit("it changes the text, or looks for words in it, before it merges")
    merged = ["".join(pair) for pair in merge_pairs(model)]
    if len(set(merged)) < len(merged):
        raise Unfit("several merges make one token")
    ranks = {unspell_bytes(token): model["vocab"][token] for token in [*BYTE_ALPHABET, *merged]}
    library = tiktoken.Encoding("ranks", pat_str=cut_pattern(description), mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [library.encode_to_numpy(text, disallowed_special=()) for text in texts]


def require_byte_level(description: Mapping[str, Any]) -> None:
    """Raise Unfit unless a tokenizer.json is a byte-level BPE of which the other libraries know every setting."""
    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        raise Unfit(f"its model is {model['type']}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise Unfit(f"its {setting} is {model[setting]!r}")
    normalizer = description.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise Unfit(f"its normalizer is {_kind(normalizer)}")
    cut_pattern(description)
    for token in tokens_in_text(description):
        if odd := [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]:
            raise Unfit(f"its added token {token['content']!r} has {odd[0]}")
    if not all(map(model["vocab"].__contains__, BYTE_ALPHABET)):
        raise Unfit("it has no token for some of the 256 bytes")


def disorder_of_merges(description: Mapping[str, Any]) -> str | None:
    """Why the lowest id that can be made is not always the next merge of a byte-level BPE, as half a sentence.

    It is, and the answer None, where merges come in the order of the ids they make, out of tokens of lower ids, and
    make every token, which they need not with `ignore_merges`.
    """
    model = description["model"]
    vocab, pairs = model["vocab"], merge_pairs(model)
    left, right, made = (
        np.fromiter(map(vocab.__getitem__, tokens), np.int64, len(pairs))
        for tokens in (map(itemgetter(0), pairs), map(itemgetter(1), pairs), map("".join, pairs))
    )
    if (made <= np.maximum(left, right)).any() or (np.diff(made) < 0).any():
        return "its merges are not in the order of its ids"
    if model.get("ignore_merges"):
        return None
    ids = np.fromiter(vocab.values(), np.int64, len(vocab))
    can_be = np.zeros(ids.max() + 1, bool)
    can_be[made] = can_be[[vocab[token] for token in BYTE_ALPHABET]] = True
    unmade = set(itertools.compress(vocab, ~can_be[ids]))
    unmade -= {token["content"] for token in description.get("added_tokens") or ()}
    return f"{len(unmade):,} of its tokens come of no merge, as {min(unmade)!r}" if unmade else None


def tokens_in_text(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json that are not special: text that spells one becomes it."""
    return [token for token in description.get("added_tokens") or () if not token.get("special")]


def cut_pattern(description: Mapping[str, Any]) -> str:
    """The regular expression that cuts text into words before merging. Raises Unfit where a tokenizer.json has other
    ways."""
    steps = description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    *splits, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise Unfit(f"its pre_tokenizer is {_kind(description.get('pre_tokenizer'))}")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    match splits:
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}, **more}]:
            if not more.get("invert") and not last.get("use_regex", True):
                return pattern
    raise Unfit(f"its pre_tokenizer is {_kind(description.get('pre_tokenizer'))}")


def merge_pairs(model: Mapping[str, Any]) -> list[Sequence[str]]:
    """The merges of a model, whichever way a tokenizer.json writes them."""
    merges = model["merges"]
    if str not in map(type, merges):
        return merges
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _kind(part: Any) -> str:
    """The types of a part of a tokenizer.json and of what it consists of, without their settings."""
    kinds = re.findall(r'"type": "(\w+)"', json.dumps(part))
    return " of ".join([kinds[0], ", ".join(kinds[1:])]) if len(kinds) > 1 else "".join(kinds) or "none"
