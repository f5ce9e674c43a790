"""Where documents begin in a range of tokens, compiled and in Python, against a count of every token."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.errors import DataError
from megatron_lite.kernels import host


def write(prefix, documents, dtype="u2"):
    """A set of documents, each a list of lengths of its sequences."""
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for lengths in documents:
            writer.add_document(np.zeros(sum(lengths), int), lengths)
    return IndexedReader(prefix)


def without_compiled(reader):
    reader = pickle.loads(pickle.dumps(reader))
    reader._bounds = None
    return reader


def counted(documents, start, stop):
    """The document of each token, and where another begins than of the token before."""
    owners = [number for number, lengths in enumerate(documents) for _ in range(sum(lengths))][start:stop]
    return [at for at in range(len(owners)) if at == 0 or owners[at] != owners[at - 1]], owners


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=12), st.sampled_from(["u2", "i4"]))
def test_documents_begin_where_tokens_change_owner(tmp_path_factory, documents, dtype):
    reader = write(tmp_path_factory.mktemp("set") / "set", documents, dtype)
    assert reader._bounds
    for each in (reader, without_compiled(reader)):
        for start, stop in itertools.combinations(range(reader.num_tokens + 1), 2):
            expected, owners = counted(documents, start, stop)
            starts = each.document_starts(start, stop)
            assert starts.dtype == np.int64 and starts.tolist() == expected
            assert each.document_at(start) == owners[0]
        some = np.arange(len(documents))[::-1]
        ends = np.cumsum([sum(lengths) for lengths in documents])[some]
        starts, stops = each.document_bounds(some)
        assert starts.dtype == stops.dtype == np.int64
        assert stops.tolist() == ends.tolist() and (stops - starts).tolist() == [sum(documents[i]) for i in some]
        with pytest.raises(IndexError):
            each.document_bounds(np.array([len(documents)]))


def test_a_set_opened_in_another_process_is_the_same(tmp_path):
    reader = write(tmp_path / "set", [[3], [4, 1], [], [2]])
    again = pickle.loads(pickle.dumps(reader))
    assert again.fingerprint == reader.fingerprint and again.document_starts(1, 9).tolist() == [0, 2, 7]
    (tmp_path / "set.idx").unlink()
    with pytest.raises(DataError, match=r"set\.idx does not exist"):
        pickle.loads(pickle.dumps(reader))


def test_an_index_smaller_than_it_says_is_not_read():
    compiled = host.module()
    for pointers_at, sequences, documents_at, bounds in [(0, 3, 0, 1), (0, 2, 8, 2), (-8, 1, 0, 1), (0, -1, 0, 1)]:
        with pytest.raises(ValueError, match="leaves its buffer"):
            compiled.DocumentBounds(bytes(20), pointers_at, sequences, documents_at, bounds, 2)
