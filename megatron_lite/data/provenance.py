"""Where a token set comes from: the manifest beside `PREFIX.bin` and `PREFIX.idx`, `PREFIX.manifest.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import DataError
from megatron_lite.publish import publish

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The facts of one token set. Training does without them; evaluation needs them for bits per byte.

    `text_bytes` is the UTF-8 text all tokens stand for, None where it was not counted; `unigram_entropy` in nats a
    token is the loss of a model that knows the frequency of every token and nothing else.

    `inputs`: of each source its name, size on disk, bytes read (unpacked) and their SHA-256. `recipe`: what the
    refinery did before. `tokenizer`: the files it was read from. `files`: bytes and SHA-256 of the set's own, by
    suffix. `difficulty`: what a part of a set divided by difficulty holds. `job`: a hash of what decided the output.
    `parts`: the sets that it was merged from.
    """

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    append_eod: bool
    documents: int
    tokens: int
    text_bytes: int | None
    unigram_entropy: float
    skipped: dict[str, int]
    created_by: str
    prepend_bos: bool = False
    tokenizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    recipe: dict[str, Any] | None = None
    shuffle_seed: int | None = None
    score_key: str | None = None
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    difficulty: dict[str, Any] | None = None
    job: str | None = None
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if type(value := getattr(self, name)) not in kinds:
                raise TypeError(f"{name} is {value!r:.60}")
        for entry in (*self.inputs, *self.parts, *self.files.values()):
            if type(entry) is not dict:
                raise TypeError(f"an entry is {entry!r:.60}")

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a token stands for; a loss in nats / (ln 2 x this) is bits per byte."""
        return self.text_bytes / self.tokens if self.text_bytes is not None and self.tokens else None


_KIND_OF = {"str": str, "int": int, "bool": bool, "None": type(None)}


def _kinds(annotation: str) -> tuple[type, ...]:
    if annotation == "float":
        return float, int
    return tuple(_KIND_OF.get(part, list if part.startswith("list") else dict) for part in annotation.split(" | "))


_KINDS = {field.name: _kinds(field.type) for field in dataclasses.fields(Provenance)}


def manifest_path(prefix: str | os.PathLike) -> Path:
    """The file of a prefix's facts."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def scores_path(prefix: str | os.PathLike) -> Path:
    """The file of a score for each document of a set: float32, in their order."""
    return Path(f"{os.fspath(prefix)}.scores.npy")


def write_provenance(prefix: str | os.PathLike, provenance: Provenance, within: Path | None = None) -> None:
    """Publish the facts of a set whole, written in the folder `within` the same disk if one is given."""
    path = manifest_path(prefix)
    try:
        publish(path, json.dumps({"format": FORMAT, **dataclasses.asdict(provenance)}, indent=1) + "\n", within)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def read_manifest(prefix: str | os.PathLike, tokens: int | None = None) -> Provenance:
    """The facts of a set, of so many tokens if that is known. Raises DataError if the file is of another or damaged."""
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        provenance = Provenance(**content)
        if tokens is not None and provenance.tokens != tokens:
            raise ValueError(f"it speaks of {provenance.tokens:,} tokens and the set has {tokens:,}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be used: {error}") from None
    return provenance


def read_provenance(prefix: str | os.PathLike, tokens: int | None = None) -> Provenance | None:
    """The facts of a set as `read_manifest` gives them; None, said in the log, where it does not.

    A set made by another program has no such file, which is not worth a word.
    """
    if not manifest_path(prefix).exists():
        return None
    try:
        return read_manifest(prefix, tokens)
    except DataError as error:
        log.once(str(error))
        return None


def check_tokenizer(prefix: str | os.PathLike, facts: Provenance | None, tokenizer: Tokenizer | None) -> None:
    """Raise DataError if a set was made with a tokenizer whose ids mean other text than those of `tokenizer`.

    Nothing is said where one of them is not known. Special tokens added later change no id.
    """
    if facts is None or tokenizer is None or tokenizer.understands(facts.tokenizer_fingerprint):
        return
    raise DataError(
        f"{os.fspath(prefix)} was made with another tokenizer, a {facts.tokenizer_type} of {facts.vocab_size:,} ids "
        f"(fingerprint {facts.tokenizer_fingerprint[:12]}), than the {tokenizer.kind} of {tokenizer.vocab_size:,} ids "
        f"(fingerprint {tokenizer.fingerprint[:12]}) that is to read it; name the one it was made with, or preprocess "
        "the text again with this one."
    )
