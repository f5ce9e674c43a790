"""Ids of documents in their frames: the compiled function and numpy's give the same."""

import itertools

import numpy as np
import pytest

from megatron_lite.data.framing import Frame, _framed, framed
from megatron_lite.errors import DataError
from megatron_lite.kernels import host

SIZE = 100


@pytest.fixture(params=["compiled", "numpy"])
def function(request):
    if request.param == "numpy":
        return _framed
    assert hasattr(host.module(), "framed")
    return framed


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("frame", [Frame(), Frame(bos=7), Frame(eod=99), Frame(7, 99)])
@pytest.mark.parametrize("lengths", [[], [0], [3], [2, 0, 1, 0], [0, 0, 5]])
def test_documents_are_framed_counted_and_narrowed(function, lengths, frame, dtype):
    documents = [np.random.default_rng(length).integers(0, SIZE, length, np.int32) for length in lengths]
    counts = np.ones(SIZE, np.uint32)

    ids, made = function(
        np.concatenate([np.empty(0, np.int32), *documents]), np.array(lengths, np.int64), frame, np.dtype(dtype), counts
    )

    expected = []
    for document in documents:
        first = [] if frame.bos is None else [frame.bos]
        last = [] if frame.eod is None or not (first or len(document)) else [frame.eod]
        expected.append([*first, *document.tolist(), *last])
    flat = list(itertools.chain(*expected))
    assert ids.tolist() == flat and made.tolist() == list(map(len, expected))
    assert (ids.dtype, made.dtype) == (dtype, "<i4")
    assert (counts - 1).tolist() == [flat.count(id) for id in range(SIZE)]


@pytest.mark.parametrize("bad", [-1, SIZE, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named(function, bad):
    with pytest.raises(DataError, match=f"token id {bad & 0xFFFFFFFF:,} is outside the vocabulary of 100 ids"):
        function(np.array([5, bad], np.int32), np.array([2]), Frame(), np.dtype("<u2"), np.zeros(SIZE, np.uint32))


def test_the_compiled_function_refuses_what_would_leave_its_arrays():
    ids, counts = np.arange(3, dtype=np.int32), np.zeros(SIZE, np.uint32)
    compiled = host.module().framed
    for lengths in ([2], [4], [4, -1], [-1, 4]):
        with pytest.raises(ValueError, match="lengths that are not those of the ids"):
            compiled(ids, np.array(lengths), None, None, 2, counts)
    for frame in ((SIZE, None), (None, -1)):
        with pytest.raises(ValueError, match="a frame outside the vocabulary"):
            compiled(ids, np.array([3]), *frame, 2, counts)
    with pytest.raises(TypeError):  # a copy would be counted in
        compiled(ids, np.array([3]), None, None, 2, np.zeros(SIZE, np.int64))
