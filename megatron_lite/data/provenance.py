"""Where a token set comes from: the facts beside `PREFIX.bin` and `PREFIX.idx`, in `PREFIX.meta.json`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from megatron_lite import log
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import DataError
from megatron_lite.publish import publish

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The facts of one token set. Training does without them; evaluation needs them for bits per byte.

    `text_bytes` is the UTF-8 text all tokens stand for, `unigram_entropy` in nats a token is the loss
    of a model that knows the frequency of every token and nothing else.
    """

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    append_eod: bool
    documents: int
    tokens: int
    text_bytes: int
    unigram_entropy: float
    skipped: dict[str, int]
    created_by: str
    prepend_bos: bool = False

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            if type(value := getattr(self, name)) not in kinds:
                raise TypeError(f"{name} is {value!r:.60}")

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token stands for; a loss in nats / (ln 2 x this) is bits per byte."""
        return self.text_bytes / self.tokens


_KINDS = {
    field.name: {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}.get(field.type, (dict,))
    for field in dataclasses.fields(Provenance)
}


def meta_path(prefix: str | os.PathLike) -> Path:
    """The file of a prefix's facts."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def write_provenance(prefix: str | os.PathLike, provenance: Provenance) -> None:
    """Publish the facts of a set whole."""
    path = meta_path(prefix)
    try:
        publish(path, json.dumps({"format": FORMAT, **dataclasses.asdict(provenance)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def read_provenance(prefix: str | os.PathLike, tokens: int) -> Provenance | None:
    """The facts of a set of that many tokens; None, said in the log, if the file is of another set or unreadable.

    A set made by another program has no such file, which is not worth a word.
    """
    path = meta_path(prefix)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        provenance = Provenance(**content)
        if provenance.tokens != tokens:
            raise ValueError(f"it speaks of {provenance.tokens:,} tokens and the set has {tokens:,}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.once(f"{path} is not used: {error}")
        return None
    return provenance


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
