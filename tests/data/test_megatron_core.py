"""Token files that megatron-core's own writer made, and its reader on ours where megatron-core is installed."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest

from megatron_lite.data.indexed import IndexedReader, IndexedWriter
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
    for name in (*MAKE["DTYPES"], "modes"):
        assert files(tmp_path, name) == files(GOLDEN, name)


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_it_reads_what_we_write(tmp_path, megatron_core, vocab_size):
    write(tmp_path / "set", vocab_size)
    read = megatron_core.IndexedDataset(str(tmp_path / "set"))
    sequences = list(itertools.chain(*DOCUMENTS))
    assert [read[i].tolist() for i in range(len(read))] == sequences
    bounds = [0, *itertools.accumulate(map(len, DOCUMENTS))]
    assert read.document_indices.tolist() == bounds
