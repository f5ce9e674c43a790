"""One unit of a corpus as tokens: what a worker makes of some blocks of text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import dtype_for
from megatron_lite.data.text_blocks import Block, BlockInFile
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import Source
from megatron_lite.data.token_documents import TokenDocuments
from megatron_lite.data.token_set_writer import IdCounts
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_ladder import stand_on
from megatron_lite.data.unit_file import UnitFile, write_unit
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
        self._bos = self._tokenizer.bos if job.prepend_bos else None
        self._eod = self._tokenizer.eod if job.append_eod else None
        self._stops = job.on_error == "stop"

    def __reduce__(self) -> tuple[type[UnitTokenizer], tuple]:
        return UnitTokenizer, self._arguments

    def __call__(self, unit: TokenUnit) -> UnitOutcome:
        blocks = [block if isinstance(block, Block) else block.block() for block in unit.blocks]
        made = [_KeyTokens(self._vocab_size) for _ in self._keys]
        scores: list[float] = []
        bad: list[tuple[Source, BadDocument]] = []
        for documents in self._batches(blocks, bad):
            for number, tokens in enumerate(made):
                tokens.add(*self._encoded([document[number] for document in documents]))
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
            sections |= {f"{name}-{number}": array.data for name, array in tokens.arrays().items()}
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

    def _encoded(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids end to end, how many of each text, and the bytes of all."""
        ids, lengths = self._tokenizer.encode_block(texts)
        if self._bos is not None:
            ids = np.insert(ids, np.cumsum(lengths) - lengths, self._bos)
            lengths = lengths + 1
        if self._eod is not None:
            # As in Megatron, a document without tokens gets no end.
            filled = lengths > 0
            ids = np.insert(ids, np.cumsum(lengths)[filled], self._eod)
            lengths = lengths + filled
        return ids, lengths, sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


class _KeyTokens:
    """The tokens of a unit under one key, in the making."""

    def __init__(self, vocab_size: int):
        self._dtype = dtype_for(vocab_size)
        self._counts = IdCounts(vocab_size)
        self._ids: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        self._counts.add(ids)
        self._ids.append(ids.astype(self._dtype))
        self._lengths.append(lengths.astype("<i4"))
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def arrays(self) -> dict[str, np.ndarray]:
        counts = self._counts.counts.astype("<u4")
        return {"ids": np.concatenate(self._ids), "lengths": np.concatenate(self._lengths), "counts": counts}


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
