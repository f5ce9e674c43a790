"""Windows over documents, and which documents a split takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.documents import SPLITS, TokenWindows, parse_split, split_documents
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.provenance import Provenance, write_provenance
from megatron_lite.errors import ConfigError, DataError


def write(prefix, documents, vocab_size=1000):
    with IndexedWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    return IndexedReader(prefix)


@given(
    st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=9),
    st.integers(1, 8),
    st.integers(1, 8),
    st.data(),
)
def test_windows_are_slices_of_the_documents(tmp_path_factory, documents, seq_length, stride, data):
    reader = write(tmp_path_factory.mktemp("set") / "set", documents)
    first = data.draw(st.integers(0, len(documents)))
    last = data.draw(st.integers(first, len(documents)))
    windows = TokenWindows(reader, seq_length, stride, (first, last))
    flat = [i for ids in documents[first:last] for i in ids]
    expected = [flat[at : at + seq_length + 1] for at in range(0, len(flat) - seq_length, stride)]
    assert [windows[p].tokens.tolist() for p in range(len(windows))] == expected
    begins = {sum(map(len, documents[first:d])) for d in range(first, last) if documents[d]}
    for p in range(len(windows)):
        at = p * (stride or seq_length)
        inside = [b - at for b in sorted(begins) if at < b <= at + seq_length]
        assert windows[p].starts.dtype == np.int64 and windows[p].starts.tolist() == [0, *inside]
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[outside]


@given(st.integers(0, 10**7), st.tuples(*[st.integers(0, 1000)] * 3).filter(any))
def test_a_split_divides_all_documents_in_proportion(num_documents, weights):
    shares = parse_split(",".join(map(str, weights)))
    bounds = [split_documents(num_documents, shares, split) for split in SPLITS]
    assert bounds[0][0] == 0 and bounds[-1][1] == num_documents
    assert bounds[0][1] == bounds[1][0] and bounds[1][1] == bounds[2][0]
    for (first, last), weight in zip(bounds, weights, strict=True):
        assert abs(last - first - num_documents * weight / sum(weights)) <= 1
        assert weight or first == last


@pytest.mark.parametrize(
    ("text", "documents", "expected"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("90/10", 7, [(0, 6), (6, 7), (7, 7)]),
        ("0.5, 0.5, 0", 5, [(0, 2), (2, 5), (5, 5)]),
        ("100", 3, [(0, 3), (3, 3), (3, 3)]),
    ],
)
def test_split_bounds_are_megatrons(text, documents, expected):
    assert [split_documents(documents, parse_split(text), split) for split in SPLITS] == expected


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2,3", "0,0,0", "1;2", "nan,1", "inf,1,0"])
def test_a_bad_split_says_how_to_write_one(text):
    with pytest.raises(ConfigError, match="969,30,1"):
        parse_split(text)


def test_ids_beyond_the_vocabulary_are_found_in_the_split_alone(tmp_path):
    windows = TokenWindows(write(tmp_path / "set", [[1, 2, 3], [4, 700, 5]]), 2)
    windows.check_vocabulary(701)
    with pytest.raises(DataError, match=r"token id 700 and the vocabulary has ids 0 to 699"):
        windows.check_vocabulary(700)
    TokenWindows(windows.reader, 2, documents=(0, 1)).check_vocabulary(4)


def test_a_negative_id_is_found(tmp_path):
    reader = write(tmp_path / "set", [[1, 2, 3]], vocab_size=70_000)
    (tmp_path / "set.bin").write_bytes(np.array([1, -5, 3], "<i4").tobytes())
    with pytest.raises(DataError, match="a negative token id"):
        TokenWindows(IndexedReader(reader.prefix), 2).check_vocabulary(70_000)


def test_ids_that_a_manifest_vouches_for_are_not_read_again(tmp_path):
    windows = TokenWindows(write(tmp_path / "set", [[1, 2, 3], [4, 700, 5]]), 2)
    write_provenance(tmp_path / "set", Provenance("ByteTokenizer", "f", 600, False, 2, 6, 9, 1.0, {}, "a test"))
    windows.check_vocabulary(600)
    with pytest.raises(DataError, match=r"token id 700 and the vocabulary has ids 0 to 598"):
        windows.check_vocabulary(599)


def test_a_very_large_set_is_checked_in_blocks_spread_evenly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_lite.data.documents._SCAN_BLOCK", 10)
    monkeypatch.setattr("megatron_lite.data.documents._SCAN_BLOCKS", 5)
    ids = np.zeros(200, int)
    ids[163] = 90
    windows = TokenWindows(write(tmp_path / "set", [ids]), 4)
    with pytest.raises(DataError, match="token id 90"):
        windows.check_vocabulary(90)
    assert "of each large token set whose manifest does not tell, 50 tokens are checked" in capsys.readouterr().err
