"""Text files to token sets: blocks of documents are encoded by worker processes and written in order."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
from typing import Literal

import numpy as np

from megatron_lite import log
from megatron_lite.config.data import DataConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.ordered_workers import map_in_order
from megatron_lite.data.provenance import Provenance, meta_path, write_provenance
from megatron_lite.data.text_blocks import BLOCK_BYTES, NO_LIMIT, Block, Limit, limited, read_blocks
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import KEYLESS, Source, TxtDocuments, find_sources, warn_of_pages
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import DataError, TokenizerError

_EXAMPLES = 3
"""Places named for each kind of skipped document."""


@dataclasses.dataclass(frozen=True)
class CorpusJob:
    """What is read, how it is tokenized and where it goes.

    A document gives one token set for each of `json_keys`, `{output_prefix}_{key}_document`. With
    `on_error` "skip" a bad document is left out of all of them and counted.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: DataConfig
    json_keys: tuple[str, ...] = ("text",)
    format: str = "auto"
    txt_documents: TxtDocuments = "file"
    limit: Limit = NO_LIMIT
    prepend_bos: bool = False
    append_eod: bool = False
    vocab_size: int | None = None
    workers: int = 1
    on_error: Literal["stop", "skip"] = "stop"
    log_interval: int = 10_000
    block_bytes: int = BLOCK_BYTES

    def prefix(self, key: str) -> str:
        """The token set of a key, named as Megatron names it."""
        return f"{self.output_prefix}_{key}_document"


@dataclasses.dataclass(frozen=True)
class _EncodedTexts:
    """The documents of one block under one key: ids end to end, ids of each, and their UTF-8 bytes."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class _EncodedBlock:
    source: Source
    read: int
    documents: int
    by_key: list[_EncodedTexts]
    bad: list[BadDocument]


class _BlockEncoder:
    """What a worker does to a block."""

    def __init__(self, job: CorpusJob):
        self._keys = job.json_keys
        self._tokenizer = build_tokenizer(job.tokenizer)
        self._bos = self._tokenizer.bos if job.prepend_bos else None
        self._eod = self._tokenizer.eod if job.append_eod else None
        self._stops = job.on_error == "stop"

    def __call__(self, block: Block) -> _EncodedBlock:
        documents: list[tuple[str, ...]] = []
        bad: list[BadDocument] = []
        for document in parse_block(block, self._keys):
            if isinstance(document, BadDocument):
                bad.append(document)
                if self._stops:
                    break
            else:
                documents.append(document)
        by_key = [self._encode([document[i] for document in documents]) for i in range(len(self._keys))]
        return _EncodedBlock(block.source, block.read, len(documents), by_key, bad)

    def _encode(self, texts: list[str]) -> _EncodedTexts:
        ids, lengths = self._tokenizer.encode_block(texts)
        if self._bos is not None:
            ids = np.insert(ids, np.cumsum(lengths) - lengths, self._bos)
            lengths = lengths + 1
        if self._eod is not None:
            # As in Megatron, a document without tokens gets no end.
            filled = lengths > 0
            ids = np.insert(ids, np.cumsum(lengths)[filled], self._eod)
            lengths = lengths + filled
        return _EncodedTexts(ids, lengths, sum(len(text.encode()) for text in texts))


class _TokenSet:
    """One token set in the making, with the counts its provenance needs."""

    def __init__(self, writer: IndexedWriter, vocab_size: int):
        self.writer = writer
        self.text_bytes = 0
        self._counts = np.zeros(vocab_size, dtype=np.int64)

    def add(self, texts: _EncodedTexts) -> None:
        self._counts += np.bincount(texts.ids, minlength=len(self._counts))
        self.text_bytes += texts.text_bytes
        # Megatron writes a document without tokens as one without sequences.
        empty = np.flatnonzero(texts.lengths == 0)
        bounds = np.concatenate([[0], np.cumsum(texts.lengths)])
        for start, stop in itertools.pairwise([-1, *empty, len(texts.lengths)]):
            if start >= 0:
                self.writer.add_document([], [])
            self.writer.add_many(
                texts.ids[bounds[start + 1] : bounds[stop]],
                texts.lengths[start + 1 : stop],
            )

    def unigram_entropy(self) -> float:
        share = self._counts[self._counts > 0] / self._counts.sum()
        return float((share * -np.log(share)).sum()) + 0.0


class _Skipped:
    """Documents that were left out, counted by reason, with the first places."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._places: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, source: Source, bad: BadDocument) -> None:
        self.counts[bad.reason] += 1
        if self.counts[bad.reason] <= _EXAMPLES:
            self._places[bad.reason].append(f"{source.name}:{bad.line}")

    def __str__(self) -> str:
        parts = []
        for reason, count in self.counts.most_common():
            more = ", ..." if count > _EXAMPLES else ""
            parts.append(f"{count:,} {reason} ({', '.join(self._places[reason])}{more})")
        return f"skipped {self.counts.total():,} bad documents: " + "; ".join(parts)


def _checked_tokenizer(job: CorpusJob) -> tuple[Tokenizer, int]:
    """The tokenizer and the vocabulary size the files are written for."""
    tokenizer = build_tokenizer(job.tokenizer)
    if job.append_eod and tokenizer.eod is None:
        raise TokenizerError(
            f"--append-eod: this {tokenizer.kind} has no token that ends a document; add one by "
            "--special-tokens '<|endoftext|>', here and in training"
        )
    if job.prepend_bos and tokenizer.bos is None:
        raise TokenizerError(
            f"--prepend-bos: this {tokenizer.kind} has no token that begins a text; add one by --special-tokens '<s>', "
            "here and in training"
        )
    if tokenizer.template and not job.prepend_bos:
        log.note(
            f"this {tokenizer.kind} would put {' '.join(tokenizer.template)} around a text, as Megatron lets it; "
            "documents are written without, --prepend-bos begins each with its begin-of-text token"
        )
    if job.vocab_size is not None and job.vocab_size < tokenizer.vocab_size:
        raise TokenizerError(
            f"--vocab-size {job.vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; "
            "leave it out or give at least that"
        )
    return tokenizer, job.vocab_size or tokenizer.vocab_size


def tokenize_corpus(job: CorpusJob) -> dict[str, Provenance]:
    """Write the token sets of a job and return the facts of each by its prefix.

    Memory does not grow with the corpus. All files are published at the end; an error or an interrupt
    leaves none behind. Raises DataError for bad input, naming file and line, and for a lost worker.
    """
    tokenizer, vocab_size = _checked_tokenizer(job)
    sources = find_sources(job.inputs, job.format, job.txt_documents)
    plain = next((source.name for source in sources if source.documents in KEYLESS), None)
    if plain is not None and len(job.json_keys) > 1:
        raise DataError(f"--json-keys {' '.join(job.json_keys)}: {plain} has no keys; give one")
    warn_of_pages(sources)
    if not job.append_eod:
        log.note("documents run into one another unmarked; --append-eod ends each with a token")
    progress, skipped = TextProgress(sources, job.log_interval), _Skipped()
    blocks = itertools.chain.from_iterable(read_blocks(source, job.block_bytes, job.json_keys) for source in sources)
    blocks = limited(blocks, job.limit)
    with contextlib.closing(progress), contextlib.ExitStack() as writers:
        sets = {
            job.prefix(key): _TokenSet(
                writers.enter_context(IndexedWriter(job.prefix(key), vocab_size=vocab_size)), vocab_size
            )
            for key in job.json_keys
        }
        with contextlib.closing(map_in_order(functools.partial(_BlockEncoder, job), blocks, job.workers)) as encoded:
            for block in encoded:
                for bad in block.bad:
                    if job.on_error == "stop":
                        raise DataError(
                            f"{block.source.place(bad.line)}: {bad.reason}: {bad.detail}. Mend it, or leave "
                            "such documents out and count them by --on-error skip"
                        )
                    skipped.add(block.source, bad)
                for token_set, texts in zip(sets.values(), block.by_key, strict=True):
                    token_set.add(texts)
                tokens = sum(len(texts.ids) for texts in block.by_key)
                text_bytes = sum(texts.text_bytes for texts in block.by_key)
                progress.add(block.read, block.documents, text_bytes, tokens)
        for prefix, token_set in sets.items():
            if token_set.writer.num_tokens == 0:
                found = f"; {skipped}" if skipped.counts else ""
                raise DataError(f"there is no text for {prefix} in {', '.join(job.inputs)}{found}; nothing was written")
        for prefix in sets:
            meta_path(prefix).unlink(missing_ok=True)
    log.note(progress.summary())
    if skipped.counts:
        log.warn(str(skipped))
    facts = {prefix: _provenance(job, tokenizer, token_set, skipped) for prefix, token_set in sets.items()}
    for prefix, provenance in facts.items():
        write_provenance(prefix, provenance)
    return facts


def _created_by() -> str:
    try:
        return f"megatron_lite {importlib.metadata.version('megatron_lite')}"
    except importlib.metadata.PackageNotFoundError:
        return "megatron_lite, not installed"


def _provenance(job: CorpusJob, tokenizer: Tokenizer, token_set: _TokenSet, skipped: _Skipped) -> Provenance:
    return Provenance(
        tokenizer_type=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        append_eod=job.append_eod,
        prepend_bos=job.prepend_bos,
        documents=token_set.writer.num_documents,
        tokens=token_set.writer.num_tokens,
        text_bytes=token_set.text_bytes,
        unigram_entropy=token_set.unigram_entropy(),
        skipped=dict(skipped.counts),
        created_by=_created_by(),
    )
