"""Token files that megatron-core's own writer made, and its reader on ours where megatron-core is installed."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.config.data import DataConfig
from megatron_lite.data.corpus_job import CorpusJob
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.token_set_merge import merge
from megatron_lite.data.tokenize_corpus import tokenize_corpus
from megatron_lite.errors import DataError

GOLDEN = Path(__file__).parent / "megatron_core"
MAKE = runpy.run_path(str(GOLDEN / "make.py"))
DOCUMENTS = MAKE["DOCUMENTS"]


def files(folder: Path, name: str) -> tuple[bytes, bytes]:
    return (folder / f"{name}.bin").read_bytes(), (folder / f"{name}.idx").read_bytes()


def write(prefix: Path, vocab_size: int) -> None:
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in DOCUMENTS:
            writer.add_document(list(itertools.chain(*document)), [len(sequence) for sequence in document])


@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 65499), ("int32", 65500)])
def test_we_write_the_same_bytes(tmp_path, dtype, vocab_size):
    write(tmp_path / "set", vocab_size)
    assert files(tmp_path, "set") == files(GOLDEN, dtype)


def test_merged_sets_are_those_of_merge_datasets(tmp_path):
    for name in ("a", "b"):
        for suffix in ("bin", "idx"):
            (tmp_path / f"{name}.{suffix}").write_bytes((GOLDEN / f"uint16.{suffix}").read_bytes())
    assert merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "merged")) == (10, 22)
    assert files(tmp_path, "merged") == files(GOLDEN, "merged")


@pytest.mark.parametrize("name", ["uint8", "uint16", "int32", "int64", "modes"])
def test_we_read_what_it_wrote(name):
    documents = MAKE["ids"](name)
    reader = IndexedReader(GOLDEN / name)
    assert (reader.num_documents, reader.num_sequences) == (5, sum(map(len, documents)))
    for i, document in enumerate(documents):
        start, stop = reader.document_token(i), reader.document_token(i + 1)
        assert reader.tokens(start, stop).tolist() == list(itertools.chain(*document))


def test_numbers_that_are_no_ids_are_refused():
    with pytest.raises(DataError, match="is a float"):
        IndexedReader(GOLDEN / "float32")


@pytest.fixture
def megatron_core():
    try:
        return MAKE["indexed_dataset"]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_the_golden_files_are_its(tmp_path, megatron_core):
    MAKE["make"](tmp_path)
    for name in (*MAKE["DTYPES"], "modes", "merged"):
        assert files(tmp_path, name) == files(GOLDEN, name)


def test_preprocessing_writes_what_its_writer_makes_of_the_same_ids(tmp_path, megatron_core):
    texts = ["first", "", "zwei", "", "x" * 300]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = DataConfig(tokenizer_type="ByteTokenizer")
    tokenize_corpus(CorpusJob((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), tokenizer, append_eod=True))
    builder = megatron_core.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in texts:
        ids = [*text.encode(), 256] if text else []
        builder.add_document(torch.tensor(ids), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files(tmp_path, "out_text_document") == files(tmp_path, "theirs")


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_it_reads_what_we_write(tmp_path, megatron_core, vocab_size):
    write(tmp_path / "set", vocab_size)
    read = megatron_core.IndexedDataset(str(tmp_path / "set"))
    sequences = list(itertools.chain(*DOCUMENTS))
    assert [read[i].tolist() for i in range(len(read))] == sequences
    bounds = [0, *itertools.accumulate(map(len, DOCUMENTS))]
    assert read.document_indices.tolist() == bounds
