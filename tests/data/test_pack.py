"""Packing: every token once, nothing cut that fits, no bin beyond its capacity, the same on every machine."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.pack import PackedDocuments, best_fit
from megatron_lite.kernels import host

item_sizes = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
)


def packed(tmp_path, texts, seq_length, **options):
    with IndexedWriter(tmp_path / "set", vocab_size=60_000) as writer:
        for document in texts:
            writer.add_document(document)
    return PackedDocuments(IndexedReader(tmp_path / "set"), seq_length, **options)


@given(item_sizes)
def test_bins_hold_every_item_once_and_no_more_than_their_capacity(case):
    capacity, sizes = case
    items, starts = best_fit(np.array(sizes, np.int32), capacity)
    assert items.dtype == starts.dtype == np.int32
    assert sorted(items.tolist()) == list(range(len(sizes)))
    bins = [items[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert all(0 < sum(sizes[i] for i in each) <= capacity and each == sorted(each) for each in bins)
    # Best fit leaves no two bins that would go into one.
    rooms = sorted(sum(sizes[i] for i in each) for each in bins)
    assert len(rooms) < 2 or rooms[0] + rooms[1] > capacity


@given(item_sizes)
def test_compiled_or_not_the_bins_are_the_same(case):
    capacity, sizes = case
    sizes = np.array(sizes, np.int32)
    compiled = host.module().best_fit(sizes, capacity)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host, "module", lambda: None)
        plain = best_fit(sizes, capacity)
    assert all(np.array_equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bins_are_never_more_than_first_fits():
    sizes = np.minimum(np.random.default_rng(0).lognormal(3, 1, 2000).astype(np.int32) + 1, 129).astype(np.int32)
    rooms: list[int] = []
    for size in sizes.tolist():
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(129)
            at = -1
        rooms[at] -= size
    starts = best_fit(sizes, 129)[1]
    assert sizes.sum() / 129 <= len(starts) - 1 < len(rooms)
    assert sizes.sum() / 129 / (len(starts) - 1) > 0.995


@pytest.mark.parametrize("sizes", [[3, 0], [3, 8]])
def test_an_item_that_fits_no_bin_is_a_programmers_mistake(sizes):
    with pytest.raises(ValueError, match="larger than a bin"):
        host.module().best_fit(np.array(sizes, np.int32), 7)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_every_token_but_a_documents_first_is_a_target_once(tmp_path_factory, lengths, seq_length):
    ends = np.cumsum([0, *lengths])
    documents = [np.arange(a, b) + 1 for a, b in itertools.pairwise(ends)]
    windows = packed(tmp_path_factory.mktemp("pack"), documents, seq_length)
    targets: list[int] = []
    for number in range(len(windows)):
        sample = windows[number]
        assert sample.tokens.shape == sample.counts.shape == (seq_length + 1,)
        assert sample.starts.dtype == np.int64 and sample.starts[0] == 0 and (np.diff(sample.starts) > 0).all()
        targets += sample.tokens[1:][sample.counts[1:]].tolist()
        assert not sample.counts[sample.starts].any()
        pieces = np.split(sample.tokens, sample.starts[1:])
        read = [piece for piece in pieces if piece[0]]
        assert all((np.diff(piece.astype(int)) == 1).all() for piece in read)
        extents = windows.extents(number)
        assert [(e.tokens, ends[e.document] + e.first + 1) for e in extents] == [(len(p), p[0]) for p in read]
        for extent in extents:
            whole = lengths[extent.document]
            assert whole > seq_length + 1 or (extent.first, extent.tokens) == (0, whole)
    assert sorted(targets) == sorted(int(token) for document in documents for token in document[1:])
    if len(windows):
        assert windows.targets * len(windows) == len(targets)


def test_a_part_of_the_documents_and_the_line_about_it(tmp_path):
    documents = [np.full(n, n) for n in (3, 9, 3, 25)]
    windows = packed(tmp_path, documents, 8, documents=(1, 4))
    assert {int(t) for k in range(len(windows)) for t in windows[k].tokens} == {0, 3, 9, 25}
    assert len(windows) == 5
    assert windows.describe().endswith(
        "37 tokens = 5 packed samples of 8, 86.67% filled; 2 documents are longer and cut"
    )
    with pytest.raises(IndexError):
        windows[5]
