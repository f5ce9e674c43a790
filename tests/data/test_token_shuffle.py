"""Documents in a shuffled order: a function of the seed and their order, whatever fits in memory."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lite.data.order import Permutation
from megatron_lite.data.token_documents import TokenDocuments, in_chunks, joined_pieces, places
from megatron_lite.data.token_shuffle import shuffled

LENGTHS = np.random.default_rng(0).integers(0, 60, 500)


def batches(size: int, lengths: np.ndarray = LENGTHS) -> list[TokenDocuments]:
    """Document k is its own number over and over, and scores it."""
    found = []
    for first in range(0, len(lengths), size):
        numbers = np.arange(first, min(first + size, len(lengths)))
        of_batch = lengths[numbers]
        found.append(TokenDocuments(np.repeat(numbers, of_batch).astype("<u2"), of_batch, numbers.astype(np.float32)))
    return found


def order_of(found: list[TokenDocuments]) -> list[int]:
    """The numbers of documents in the order they came in, their ids and lengths checked."""
    numbers = []
    for batch in found:
        of_batch = batch.scores.astype(int)
        assert batch.lengths.tolist() == LENGTHS[of_batch].tolist()
        assert batch.ids.tolist() == np.repeat(of_batch, batch.lengths).tolist()
        numbers += of_batch.tolist()
    return numbers


def test_documents_are_sorted_by_their_keys(tmp_path):
    found = order_of(list(shuffled(batches(100), 7, 2 * LENGTHS.sum(), 1 << 30, tmp_path / "work")))
    keys = Permutation(1 << 63, "documents", 7)(np.arange(500))
    assert found == np.argsort(keys).tolist()
    assert not (tmp_path / "work").exists()
    # No trace of the order before: neighbours are as far apart as by chance.
    assert 120 < np.abs(np.diff(found)).mean() < 210


@pytest.mark.parametrize(("size", "memory"), [(1, 1 << 20), (33, 4096), (500, 700)])
def test_the_order_does_not_depend_on_batches_or_memory(tmp_path, size, memory):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "000000.heads").write_bytes(b"of a run that was killed")
    usual = order_of(list(shuffled(batches(100), 7, 2 * LENGTHS.sum(), 1 << 30, tmp_path / "usual")))
    assert order_of(list(shuffled(batches(size), 7, 2 * LENGTHS.sum(), memory, tmp_path / "work"))) == usual
    assert order_of(list(shuffled(batches(size), 8, 2 * LENGTHS.sum(), memory, tmp_path / "work"))) != usual
    assert not list(tmp_path.glob("work/*"))


def test_nothing_shuffled_is_nothing(tmp_path):
    assert list(shuffled([], 1, 0, 1000, tmp_path / "work")) == []
    empty = TokenDocuments(np.zeros(0, "<u2"), np.zeros(3, np.int64), np.zeros(3, np.float32))
    (found,) = shuffled([empty], 1, 0, 1000, tmp_path / "work")
    assert len(found) == 3 and not len(found.ids)


def test_chunks_are_whole_documents_in_order():
    lengths = np.array([0, 5, 5, 30, 0, 0, 1, 9, 2])
    runs = list(in_chunks(lengths, 10))
    assert [number for run in runs for number in range(run.start, run.stop)] == list(range(9))
    assert max(lengths[run].sum() for run in runs) <= 10 + 30
    assert list(in_chunks(lengths[:0])) == []


def test_places_of_stretches_follow_one_another():
    assert places(np.array([7, 0, 3]), np.array([2, 0, 3])).tolist() == [7, 8, 3, 4, 5]
    assert places(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_pieces_are_joined_in_the_order_asked_for():
    flat = np.arange(10)
    assert joined_pieces(flat, np.array([10, 3, 3]), np.array([2, 3, 0])).tolist() == [8, 9, 0, 1, 2]
    assert joined_pieces(flat, np.zeros(0, int), np.zeros(0, int)).tolist() == []
