"""Tokenizers that the `tokenizers` library runs: any tokenizer.json, and GPT-2's vocabulary and merges."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from megatron_lite.data.tokenizer_engines import (
    Encode,
    Unfit,
    disorder_of_merges,
    gigatoken_of_description,
    merge_pairs,
    require_byte_level,
    tiktoken_of_description,
)
from megatron_lite.data.tokenizer_files import ROLE_FILES
from megatron_lite.data.tokenizer_interface import ROLE_NAMES, Tokenizer
from megatron_lite.errors import TokenizerError

_IRRELEVANT = ("trim_offsets",)
"""Settings of a tokenizer.json that change no id."""


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path} is not a JSON file ({error}); give the file the tokenizer was saved to") from None


@contextlib.contextmanager
def _described_by(source: str) -> Iterator[None]:
    """What the library refuses is a TokenizerError: it raises plain Exception whatever is wrong, or panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{source} is not a tokenizer that `tokenizers` can read: {error}") from None


def _essence(value: Any) -> Any:
    """A part of a tokenizer.json without what is unset, so that files of different versions compare equal."""
    if isinstance(value, dict):
        return {
            key: _essence(part)
            for key, part in value.items()
            if key not in _IRRELEVANT and part is not None and part is not False and part != ""
        }
    if isinstance(value, list):
        return [_essence(part) for part in value]
    return value


def _merges(file: Path, vocab_file: Path, vocab: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The merges of a file in the form of GPT-2's vocab.bpe. Raises TokenizerError naming the line that is none."""
    text = file.read_text(encoding="utf-8")
    begin = len(text.partition("\n")[0]) + 1 if text.startswith("#version") else 0
    tokens = text[begin:].split()
    merges = list(zip(tokens[::2], tokens[1::2], strict=False))
    two_a_line = "\n".join(map(" ".join, merges)) == text[begin:].rstrip("\n")
    if two_a_line and all(map(vocab.__contains__, itertools.chain(tokens, map("".join, merges)))):
        return merges
    merges = []
    for number, line in enumerate(text[begin:].split("\n"), 2 if begin else 1):
        pair = tuple(line.split())
        if pair and (len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}):
            raise TokenizerError(
                f"{file}, line {number}: {line!r} is not a merge of two tokens of {vocab_file}; "
                "give vocabulary and merges of one tokenizer"
            )
        merges += [pair] if pair else []
    return merges


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, run by `tokenizers`; what its post-processor adds is `template`.

    `description` is the content of the file. `roles` come from a tokenizer_config.json beside it, else from the usual
    names among its special tokens.
    """

    kind = "HuggingFaceTokenizer"
    library = "tokenizers"

    def __init__(self, description: Mapping[str, Any], roles: Mapping[str, str], source: str):
        self._description, self._source = description, source
        self._added = self._added_tokens()
        with _described_by(source):
            has_template = description.get("post_processor") is not None
            self.template = tuple(self._library.encode("", add_special_tokens=True).tokens) if has_template else ()
        names = {name for candidates in ROLE_NAMES.values() for name in candidates}
        specials = {text: id for text, (id, is_special) in self._added.items() if is_special or text in names}
        vocab = description["model"].get("vocab")
        if not (isinstance(vocab, dict) and vocab):
            vocab = self._library.get_vocab(with_added_tokens=True)
        ids = collections.ChainMap({text: id for text, (id, _) in self._added.items()}, vocab)
        role_ids = {role: ids.get(token) for role, token in roles.items()}
        unknown = description["model"].get("unk_token")
        if isinstance(unknown, str):
            role_ids.setdefault("unk", ids.get(unknown))
        largest = max(itertools.chain(*(each.values() for each in ids.maps)), default=-1)
        super().__init__(largest + 1, specials, role_ids)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        with _described_by(self._source):
            library = self._made_library()
            library.encode_special_tokens = True
            library.no_truncation()
            library.no_padding()
            return library

    def _made_library(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_buffer(orjson.dumps(self._description))

    def _added_tokens(self) -> Mapping[str, tuple[int, bool]]:
        """The id of each token that was added to the model's own, and whether it is special."""
        return {token.content: (id, token.special) for id, token in self._library.get_added_tokens_decoder().items()}

    @classmethod
    def from_path(cls, path: Path) -> HuggingFaceTokenizer:
        """Load a tokenizer.json or the folder that holds one."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(f"{file} does not exist; give a tokenizer.json or the folder that holds one")
        description = _read_json(file)
        if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
            raise TokenizerError(f'{file} has no section "model"; it is JSON, but not a tokenizer.json')
        settings: dict[str, Any] = {}
        for name in ROLE_FILES:
            if (file.parent / name).is_file():
                found = _read_json(file.parent / name)
                if not isinstance(found, dict):
                    raise TokenizerError(f"{file.parent / name} is no JSON object; take it away, or mend it")
                settings |= found
        roles = {}
        for role in ("bos", "eos", "pad", "unk"):
            token = settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                roles[role] = token
        return cls(description, roles, str(file))

    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        # One text a call: a batch starts a thread a core, and the processes of a corpus share the cores already.
        encode = self._library.encode_batch_fast
        return [encode([text], add_special_tokens=False)[0].ids for text in texts]

    def engines(self) -> Mapping[str, Callable[[], Encode]]:
        made_by = {"gigatoken": gigatoken_of_description, "tiktoken": tiktoken_of_description}
        return {name: functools.partial(self._engine, make) for name, make in made_by.items()}

    def _engine(self, make: Callable[[Mapping[str, Any]], Encode]) -> Encode:
        require_byte_level(self._description)
        return make(self._description)

    def disorder(self) -> str | None:
        try:
            require_byte_level(self._description)
        except Unfit as reason:
            return str(reason)
        return disorder_of_merges(self._description)

    def _decode_ids(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def _base_token(self, id: int) -> str | None:
        return self._library.id_to_token(id)

    def _base_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def _content(self) -> Any:
        model = dict(self._description["model"])
        vocabulary = {"vocab": model.pop("vocab", None), "merges": merge_pairs({"merges": model.pop("merges", ())})}
        parts = {part: self._description.get(part) for part in ("normalizer", "pre_tokenizer")}
        added = {text: id for text, (id, _) in self._added.items()}
        return _essence({"model": model, "added": added, **parts}) | vocabulary


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """GPT-2's byte-level BPE out of its two files, encoder.json (token to id) and vocab.bpe (merges)."""

    kind = "GPT2BPETokenizer"

    @classmethod
    def from_files(cls, vocab_file: Path, merge_file: Path) -> GPT2BPETokenizer:
        """Load vocabulary and merges. Raises TokenizerError naming file and line of what does not fit."""
        vocab = _read_json(vocab_file)
        if not isinstance(vocab, dict) or {*map(type, vocab.values())} != {int} or min(vocab.values()) < 0:
            raise TokenizerError(f"{vocab_file} is not a map of tokens to ids; give GPT-2's encoder.json or vocab.json")
        merges = _merges(merge_file, vocab_file, vocab)
        special = "<|endoftext|>"
        added = [{"id": vocab[special], "content": special, "special": True}] if special in vocab else []
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        description = {
            "version": "1.0",
            "added_tokens": [token | flags for token in added],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
        return cls(description, {}, f"{vocab_file} with {merge_file}")

    # The files were looked through: the library, which takes a while to make, waits until it is asked.

    def _made_library(self) -> tokenizers.Tokenizer:
        model = self._description["model"]
        library = tokenizers.Tokenizer(tokenizers.models.BPE(model["vocab"], model["merges"]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in self._added])
        return library

    def _added_tokens(self) -> Mapping[str, tuple[int, bool]]:
        return {token["content"]: (token["id"], token["special"]) for token in self._description["added_tokens"]}
