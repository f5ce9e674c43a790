"""One unit of a corpus as tokens: what a worker makes of some blocks of text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.framing import Frame, framed
from megatron_lite.data.indexed import dtype_for
from megatron_lite.data.text_blocks import Block, BlockInFile
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import Source
from megatron_lite.data.token_documents import TokenDocuments
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_ladder import stand_on
from megatron_lite.data.unit_file import UnitFile, write_unit
from megatron_lite.kernels import host
from megatron_lite.kernels.crc32 import crc32

_ENCODED_AT_ONCE = 1 << 20
"""Characters: libraries take some times the memory of the text."""


@dataclasses.dataclass(frozen=True)
class TokenUnit:
    """Some blocks of the input and the file their tokens go to."""

    path: Path
    blocks: tuple[Block | BlockInFile, ...]


@dataclasses.dataclass(frozen=True)
class UnitOutcome:
    """What a unit came to. `read` is bytes on disk; `bad` the document that stops the job: then nothing is written."""

    path: Path
    read: int
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    bad: tuple[Source, BadDocument] | None = None


class UnitTokenizer:
    """What a worker does: units in, their files out.

    A file has, for each of `keys` by number, the ids of all documents (`ids-0`, in the dtype of the set), their lengths
    (`lengths-0`, int32) and how often each id occurs (`counts-0`, uint32); and scores, float32, where there are any.
    `digest` is the job's; `engine` is what a `Ladder` said of `tokenizer`, which is made anew where this is unpickled.
    """

    def __init__(
        self,
        job: CorpusJob,
        digest: str,
        keys: Sequence[str],
        vocab_size: int,
        engine: str,
        tokenizer: Tokenizer | None = None,
    ):
        self._arguments = (job, digest, keys, vocab_size, engine)
        self._digest = digest
        self._keys, self._vocab_size = keys, vocab_size
        self._number_keys = () if job.score_key is None else (job.score_key,)
        if tokenizer is None:
            tokenizer = build_tokenizer(job.tokenizer)
            stand_on(tokenizer, engine)
        self._tokenizer = tokenizer
        self._frame = Frame(tokenizer.bos if job.prepend_bos else None, tokenizer.eod if job.append_eod else None)
        self._stops = job.on_error == "stop"
        host.module()  # copies have it then, and a warning is given once

    def __reduce__(self) -> tuple[type[UnitTokenizer], tuple]:
        return UnitTokenizer, self._arguments

    def __call__(self, unit: TokenUnit) -> UnitOutcome:
        blocks = [block if isinstance(block, Block) else block.block() for block in unit.blocks]
        made = [_KeyTokens(self._tokenizer, self._frame, self._vocab_size) for _ in self._keys]
        scores: list[float] = []
        bad: list[tuple[Source, BadDocument]] = []
        for documents in self._batches(blocks, bad):
            for number, tokens in enumerate(made):
                tokens.add([document[number] for document in documents])
            scores += [document[-1] for document in documents] if self._number_keys else []
        read = sum(block.read for block in blocks)
        if bad and self._stops:
            return UnitOutcome(unit.path, read, bad=bad[0])
        head = {
            "job": self._digest,
            "input_crc32": crc_of(blocks),
            "documents": made[0].documents,
            "text_bytes": [tokens.text_bytes for tokens in made],
            "bad": [(source.name, document.line, document.reason) for source, document in bad],
        }
        sections = {"scores": np.array(scores, "<f4").data}
        for number, tokens in enumerate(made):
            sections |= {f"{name}-{number}": data for name, data in tokens.sections().items()}
        write_unit(unit.path, head, sections, synced=False)
        return UnitOutcome(
            unit.path,
            read,
            made[0].documents,
            sum(tokens.text_bytes for tokens in made),
            sum(tokens.tokens for tokens in made),
        )

    def _batches(self, blocks: Iterable[Block], bad: list[tuple[Source, BadDocument]]) -> Iterator[list[tuple]]:
        """The documents of blocks, as many at a time as are encoded at once; bad ones go to `bad`."""
        batch: list[tuple] = []
        characters = 0
        for block in blocks:
            for document in parse_block(block, self._keys, self._number_keys):
                if isinstance(document, BadDocument):
                    bad.append((block.source, document))
                    if self._stops:
                        return
                    continue
                batch.append(document)
                characters += sum(map(len, document[: len(self._keys)]))
                if characters >= _ENCODED_AT_ONCE:
                    yield batch
                    batch, characters = [], 0
        yield batch


class _KeyTokens:
    """The tokens of a unit under one key, in the making."""

    def __init__(self, tokenizer: Tokenizer, frame: Frame, vocab_size: int):
        self._tokenizer, self._frame, self._dtype = tokenizer, frame, dtype_for(vocab_size)
        self._counts = np.zeros(vocab_size, "<u4")
        self._ids: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, texts: Sequence[str]) -> None:
        """Encode documents. Raises DataError for an id outside the vocabulary."""
        ids, lengths = framed(*self._tokenizer.encode_block(texts), self._frame, self._dtype, self._counts)
        self._ids.append(ids)
        self._lengths.append(lengths)
        self.documents += len(texts)
        self.tokens += len(ids)
        self.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def sections(self) -> dict[str, memoryview]:
        """The parts of a unit's file, but for the number of the key."""
        arrays = {"ids": np.concatenate(self._ids), "lengths": np.concatenate(self._lengths), "counts": self._counts}
        return {name: array.data for name, array in arrays.items()}


def grouped(blocks: Iterable[Block], size: int) -> Iterator[tuple[Block, ...]]:
    """Blocks that follow one another, of `size` bytes or more together: small files share a unit."""
    group: list[Block] = []
    held = 0
    for block in blocks:
        group.append(block)
        held += len(block.data)
        if held >= size:
            yield tuple(group)
            group, held = [], 0
    if group:
        yield tuple(group)


def crc_of(blocks: Iterable[Block]) -> int:
    """CRC-32 of the bytes of blocks: whether a unit's input is what it was."""
    return functools.reduce(lambda crc, block: crc32(block.data, crc), blocks, 0)


def unit_documents(unit: UnitFile, key: int, dtype: np.dtype) -> TokenDocuments:
    """The tokens of a unit under the key of that number. Scores are 0 where there are none."""
    lengths = np.frombuffer(unit.section(f"lengths-{key}"), "<i4").astype(np.int64)
    scores = np.frombuffer(unit.section("scores"), "<f4")
    return TokenDocuments(
        np.frombuffer(unit.section(f"ids-{key}"), dtype),
        lengths,
        scores if len(scores) else np.zeros(len(lengths), np.float32),
    )


def unit_counts(unit: UnitFile, key: int) -> np.ndarray:
    """How often each id occurs in a unit under the key of that number."""
    return np.frombuffer(unit.section(f"counts-{key}"), "<u4")
