"""Token files against an oracle written with `struct` alone, and every way they can be damaged."""

import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.errors import DataError

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H", 9: "I", 10: "Q"}


def index_bytes(lengths, documents, code=8, width=2, version=1, magic=b"MMIDIDX\x00\x00", pointers=None, modes=b""):
    """An index as the format says, field by field."""
    if pointers is None:
        pointers = [width * sum(lengths[:i]) for i in range(len(lengths))]
    out = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    out += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(documents))
    out += b"".join(struct.pack("<i", length) for length in lengths)
    out += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    out += b"".join(struct.pack("<q", bound) for bound in documents)
    return out + modes


def put(folder, index, tokens=b""):
    prefix = folder / "set"
    (folder / "set.idx").write_bytes(index)
    (folder / "set.bin").write_bytes(tokens)
    return prefix


def tokens_bytes(ids, letter="H"):
    return struct.pack(f"<{len(ids)}{letter}", *ids)


documents_of_ids = st.lists(st.lists(st.lists(st.integers(0, 65498), max_size=6), min_size=1, max_size=3), max_size=8)


@given(documents_of_ids, st.sampled_from([65499, 65500]))
def test_written_bytes_are_the_formats(tmp_path_factory, documents, vocab_size):
    folder = tmp_path_factory.mktemp("set")
    letter, code = ("H", 8) if vocab_size < 65500 else ("i", 4)
    with IndexedWriter(folder / "set", vocab_size=vocab_size) as writer:
        for sequences in documents:
            writer.add_document([i for ids in sequences for i in ids], [len(ids) for ids in sequences])
    lengths = [len(ids) for sequences in documents for ids in sequences]
    bounds = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    flat = [i for sequences in documents for ids in sequences for i in ids]
    assert (folder / "set.bin").read_bytes() == tokens_bytes(flat, letter)
    assert (folder / "set.idx").read_bytes() == index_bytes(lengths, bounds, code, struct.calcsize(f"<{letter}"))

    reader = IndexedReader(folder / "set")
    assert (reader.num_tokens, reader.num_sequences, reader.num_documents) == (len(flat), len(lengths), len(documents))
    assert reader.tokens(0, reader.num_tokens).tolist() == flat
    ends = np.cumsum([0] + [sum(map(len, sequences)) for sequences in documents])
    assert [reader.document_token(d) for d in range(len(documents) + 1)] == ends.tolist()
    assert reader.max_token_id() == max(flat, default=0)
    assert sorted(os.listdir(folder)) == ["set.bin", "set.idx"]


@pytest.mark.parametrize("code", CODES)
def test_every_integer_dtype_is_read(tmp_path, code):
    letter = CODES[code]
    index = index_bytes([2, 3], [0, 1, 2], code, struct.calcsize(f"<{letter}"))
    reader = IndexedReader(put(tmp_path, index, tokens_bytes([1, 2, 3, 4, 127], letter)))
    assert reader.tokens(1, 5).tolist() == [2, 3, 4, 127]
    assert reader.max_token_id(0, 3) == 3


def test_stretches_are_copied_end_to_end_and_lie_within_the_set(tmp_path):
    reader = IndexedReader(put(tmp_path, index_bytes([5], [0, 1]), tokens_bytes([1, 2, 3, 4, 5])))
    assert reader.stretches(np.array([3, 0]), np.array([2, 3])).tolist() == [4, 5, 1, 2, 3]
    assert reader.stretches(np.zeros(0, int), np.zeros(0, int)).tolist() == []
    for starts, lengths in (([0, -3], [1, 2]), ([0, 4], [1, 2]), ([6], [0]), ([3], [-1])):
        with pytest.raises(IndexError, match="stretches from token"):
            reader.stretches(np.array(starts), np.array(lengths))


def test_modes_of_a_multimodal_set_are_passed_over(tmp_path):
    reader = IndexedReader(put(tmp_path, index_bytes([1, 1], [0, 2], modes=b"\x00\x01"), tokens_bytes([5, 6])))
    assert reader.tokens(0, 2).tolist() == [5, 6]


def test_add_many_is_many_documents(tmp_path):
    with (
        IndexedWriter(tmp_path / "one", vocab_size=100) as one,
        IndexedWriter(tmp_path / "many", vocab_size=100) as many,
    ):
        for ids in ([1, 2, 3], [], [4]):
            one.add_document(ids)
        many.add_many(np.array([1, 2, 3, 4]), np.array([3, 0, 1]))
        assert (many.num_documents, many.num_sequences, many.num_tokens) == (3, 3, 4)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"many.{suffix}").read_bytes()


TOKENS = tokens_bytes([1, 2, 3, 4, 5])
DAMAGE = {
    "legacy": (b"TNTIDX\x00\x00" + bytes(100), TOKENS, "TNTIDX"),
    "magic": (index_bytes([5], [0, 1], magic=b"MMIDIDY\x00\x00"), TOKENS, "magic"),
    "empty index": (b"", TOKENS, "magic"),
    "short header": (index_bytes([5], [0, 1])[:20], TOKENS, "header"),
    "version": (index_bytes([5], [0, 1], version=2), TOKENS, "version is 2"),
    "float of Megatron": (index_bytes([5], [0, 1], code=7), TOKENS, "dtype code 7 is a float"),
    "float of GPT-NeoX": (index_bytes([5], [0, 1], code=6), TOKENS, "dtype code 6 is a float"),
    "dtype": (index_bytes([5], [0, 1], code=77), TOKENS, "dtype code 77"),
    "no document bound": (index_bytes([5], []), TOKENS, "document count is 0"),
    "truncated index": (index_bytes([2, 3], [0, 1, 2])[:-1], TOKENS, "sequence count 2"),
    "absurd count": (index_bytes([], [0])[:18] + struct.pack("<QQ", 2**61, 2) + bytes(40), TOKENS, "sequence count"),
    "negative length": (index_bytes([6, -1], [0, 1, 2]), TOKENS, r"lengths\[1\] is -1"),
    "overlap": (index_bytes([2, 3], [0, 1, 2], pointers=[0, 2]), TOKENS, r"pointers\[1\] is 2 .* byte 4"),
    "gap": (index_bytes([2, 2], [0, 1, 2], pointers=[0, 6]), TOKENS, r"pointers\[1\] is 6"),
    "unaligned": (index_bytes([2, 3], [0, 1, 2], pointers=[0, 3]), TOKENS, r"pointers\[1\] is 3"),
    "late start": (index_bytes([4], [0, 1], pointers=[2]), TOKENS, r"pointers\[0\] is 2"),
    "truncated tokens": (index_bytes([5], [0, 1]), TOKENS[:-2], "size is 8 bytes .* add up to 10.*truncated"),
    "more tokens": (index_bytes([5], [0, 1]), TOKENS + b"\x00\x00", "no sequence covers"),
    "no tokens": (index_bytes([5], [0, 1]), b"", "size is 0 bytes"),
    "documents begin late": (index_bytes([2, 3], [1, 2]), TOKENS, "bounds run from 1 to 2"),
    "documents end early": (index_bytes([2, 3], [0, 1]), TOKENS, "bounds run from 0 to 1"),
    "documents end late": (index_bytes([2, 3], [0, 7]), TOKENS, "bounds run from 0 to 7"),
    "documents fall": (index_bytes([2, 3], [0, 2, 1, 2]), TOKENS, "document bound 2 is 1, before bound 1 at 2"),
    "wild document": (index_bytes([2, 3], [0, -9, 2]), TOKENS, "document bound 1 is -9"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_file_and_field(tmp_path, name):
    index, tokens, message = DAMAGE[name]
    with pytest.raises(DataError, match=message) as raised:
        IndexedReader(put(tmp_path, index, tokens))
    assert str(tmp_path / "set.") in str(raised.value)


@given(st.data())
def test_no_flipped_byte_of_an_index_leads_outside_the_file(tmp_path_factory, data):
    """Either the damage is seen, or what is read still lies within the tokens."""
    index = bytearray(index_bytes([2, 0, 3], [0, 1, 1, 3]))
    index[data.draw(st.integers(0, len(index) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        reader = IndexedReader(put(tmp_path_factory.mktemp("set"), bytes(index), TOKENS))
    except DataError:
        return
    assert all(0 <= reader.document_token(d) <= reader.num_tokens for d in range(reader.num_documents + 1))
    assert reader.num_tokens * reader.dtype.itemsize == len(TOKENS)


def test_damage_behind_the_first_chunk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lite.data.indexed._CHUNK", 4)
    lengths, bounds = [1] * 11, list(range(12))
    prefix = put(tmp_path, index_bytes(lengths, bounds), tokens_bytes(range(11)))
    assert IndexedReader(prefix).max_token_id() == 10
    for at in range(1, 11):
        pointers = [2 * i + (i == at) for i in range(11)]
        put(tmp_path, index_bytes(lengths, bounds, pointers=pointers), tokens_bytes(range(11)))
        with pytest.raises(DataError, match=rf"pointers\[{at}\]"):
            IndexedReader(prefix)
        wrong = [bound - 5 * (i == at) for i, bound in enumerate(bounds)]
        put(tmp_path, index_bytes(lengths, wrong), tokens_bytes(range(11)))
        with pytest.raises(DataError, match=f"document bound {at} "):
            IndexedReader(prefix)


def test_missing_files_are_named(tmp_path):
    put(tmp_path, index_bytes([5], [0, 1]), TOKENS)
    with pytest.raises(DataError, match=r"leave \.bin off the prefix"):
        IndexedReader(tmp_path / "set.bin")
    (tmp_path / "set.bin").unlink()
    with pytest.raises(DataError, match=r"set\.bin does not exist"):
        IndexedReader(tmp_path / "set")


def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path):
    size = 1 << 16
    prefix = put(tmp_path, index_bytes([size], [0, 1]), bytes(2 * size))
    reader = IndexedReader(prefix)
    os.truncate(tmp_path / "set.bin", 100)
    with pytest.raises(DataError, match="shrank from 131,072 to 100"):
        reader.tokens(size - 10, size)


def test_slices_are_views_within_bounds(tmp_path):
    reader = IndexedReader(put(tmp_path, index_bytes([5], [0, 1]), TOKENS))
    assert reader.tokens(0, 5).base is not None and not reader.tokens(0, 5).flags.writeable
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(IndexError):
            reader.tokens(start, stop)


def test_fingerprint_follows_the_content(tmp_path):
    prefix = put(tmp_path, index_bytes([5], [0, 1]), TOKENS)
    first = IndexedReader(prefix).fingerprint
    assert IndexedReader(prefix).fingerprint == first
    put(tmp_path, index_bytes([5], [0, 1]), tokens_bytes([1, 2, 3, 4, 6]))
    other_tokens = IndexedReader(prefix).fingerprint
    put(tmp_path, index_bytes([2, 3], [0, 2]), TOKENS)
    assert len({first, other_tokens, IndexedReader(prefix).fingerprint}) == 3


def test_negative_ids_count_as_large(tmp_path):
    reader = IndexedReader(put(tmp_path, index_bytes([2], [0, 1], 4, 4), tokens_bytes([7, -1], "i")))
    assert reader.max_token_id() == 2**32 - 1


@pytest.mark.parametrize("bad", [[100], [-1], np.array([5, 65536]), np.array([2**40])])
def test_an_id_outside_the_vocabulary_is_not_written(tmp_path, bad):
    with (
        pytest.raises(DataError, match="outside the vocabulary of 100 ids"),
        IndexedWriter(tmp_path / "set", 100) as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document(bad)
    assert os.listdir(tmp_path) == []


def test_lengths_must_fit_the_ids(tmp_path):
    with IndexedWriter(tmp_path / "set", dtype="uint16") as writer:
        with pytest.raises(ValueError, match="add up to 3 and there are 2"):
            writer.add_many([1, 2], [1, 2])
        with pytest.raises(DataError, match="at most 2,147,483,647"):
            writer.add_many([1, 2], [2**31, 2 - 2**31])
        with pytest.raises(ValueError, match="length of -1"):
            writer.add_many([1, 2], [3, -1])


def test_nothing_is_visible_before_close_and_an_abort_keeps_the_old_set(tmp_path):
    old = put(tmp_path, index_bytes([5], [0, 1]), TOKENS)
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "set", 100) as writer:
        writer.add_document([1, 2])
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["set.bin", "set.idx"]
    assert IndexedReader(old).tokens(0, 5).tolist() == [1, 2, 3, 4, 5]
    writer = IndexedWriter(tmp_path / "set", 100)
    writer.add_document([9])
    assert IndexedReader(old).num_tokens == 5
    writer.close()
    writer.close()
    assert IndexedReader(old).tokens(0, 1).tolist() == [9]


def test_a_crash_between_the_renames_leaves_no_mixed_set(tmp_path, monkeypatch):
    put(tmp_path, index_bytes([5], [0, 1]), TOKENS)
    writer = IndexedWriter(tmp_path / "set", 100)
    writer.add_document([9, 9, 9, 9, 9])
    replace = os.replace

    def dies_at_the_index(source, target):
        if str(target).endswith(".idx"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_at_the_index)
    with pytest.raises(DataError, match="Input/output error"):
        writer.close()
    with pytest.raises(DataError, match=r"set\.idx does not exist"):
        IndexedReader(tmp_path / "set")
    assert os.listdir(tmp_path) == ["set.bin"]


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    program = """
        import resource, signal, sys
        from megatron_lite.data.indexed import IndexedWriter
        from megatron_lite.errors import DataError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))
        try:
            with IndexedWriter(sys.argv[1], 100) as writer:
                for _ in range(40):
                    writer.add_document(range(100))
                    writer.add_many([7] * 50_000, [1] * 50_000)
        except DataError as error:
            sys.exit(f"refused: {error}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "set"], capture_output=True, text=True
    )
    assert done.stderr.startswith("refused: ") and "File too large" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []


def test_the_data_index_needs_no_torch():
    program = (
        "import sys, megatron_lite.data.indexed, megatron_lite.data.stream, megatron_lite.data.rules\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
