"""Layouts of parameters against plain slicing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pasting import paste

from megatron_lite.parallel.layout import replicated, split


def _reassemble(layouts, tensor):
    into = torch.full_like(tensor, float("nan"))
    for layout in layouts:
        paste(layout, layout.cut(tensor), into)
    return into


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_is_torch_chunk(dim, size):
    tensor = torch.randn(8, 12)
    layouts = [split((8, 12), dim, rank, size) for rank in range(size)]
    for layout, chunk in zip(layouts, tensor.chunk(size, dim), strict=True):
        assert torch.equal(layout.cut(tensor), chunk)
    assert torch.equal(_reassemble(layouts, tensor), tensor)


def test_sections_are_split_each():
    tensor = torch.randn(12, 3)
    layouts = [split((12, 3), 0, rank, 2, sections=(8, 4)) for rank in range(2)]
    assert torch.equal(layouts[0].cut(tensor), torch.cat([tensor[0:4], tensor[8:10]]))
    assert torch.equal(layouts[1].cut(tensor), torch.cat([tensor[4:8], tensor[10:12]]))
    assert torch.equal(_reassemble(layouts, tensor), tensor)


def test_padding_is_zero_and_never_stored():
    tensor = torch.randn(10, 3)
    layouts = [split((10, 3), 0, rank, 4, padded=16) for rank in range(4)]
    assert [layout.cut(tensor).shape[0] for layout in layouts] == [4, 4, 4, 4]
    assert torch.equal(layouts[2].cut(tensor)[2:], torch.zeros(2, 3))
    assert layouts[3].boxes == () and layouts[3].fragments() == []
    assert torch.equal(_reassemble(layouts, tensor), tensor)


def test_replicas_have_one_owner():
    layouts = [split((8, 3), 0, rank, 4, sections=(4, 4), replicas=2) for rank in range(4)]
    assert [layout.is_owner for layout in layouts] == [True, False, True, False]
    assert layouts[0].boxes == layouts[1].boxes != layouts[2].boxes
    assert replicated((3,), 1).is_owner is False


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 5),
    size=st.sampled_from([1, 2, 3]),
    cut=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    sections=st.integers(1, 3),
)
def test_fragments_cover_a_flat_range_exactly(rows, columns, size, cut, sections):
    shape = (rows * size * sections, columns)
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1
    for rank in range(size):
        layout = split(shape, 0, rank, size, sections=(rows * size,) * sections)
        flat = layout.cut(tensor).flatten()
        start, stop = sorted(min(c, flat.numel()) for c in cut)
        seen = torch.zeros_like(flat)
        for piece in layout.fragments(start, stop):
            length = math.prod(piece.shape)
            held = flat[piece.flat_start : piece.flat_start + length].reshape(piece.shape)
            window = tuple(slice(a, a + n) for a, n in zip(piece.global_start, piece.shape, strict=True))
            assert torch.equal(tensor[window], held)
            seen[piece.flat_start : piece.flat_start + length] += 1
        expected = torch.zeros_like(flat)
        expected[start:stop] = 1
        assert torch.equal(seen, expected)
