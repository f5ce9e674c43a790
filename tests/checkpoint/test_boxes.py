"""Rectangles, held against numpy arrays of element numbers."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.checkpoint.boxes import Rectangle, rectangles_of, tiling_fault

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def rectangles(draw, shape):
    start = tuple(draw(st.integers(0, length - 1)) for length in shape)
    return Rectangle(start, tuple(draw(st.integers(1, length - a)) for length, a in zip(shape, start, strict=True)))


def tiles(draw, rectangle, cuts):
    """A random tiling of `rectangle` by up to `cuts` straight cuts."""
    wide = [dim for dim, length in enumerate(rectangle.shape) if length > 1]
    if not wide or not cuts:
        return [rectangle]
    dim = draw(st.sampled_from(wide))
    at = draw(st.integers(1, rectangle.shape[dim] - 1))
    (start, shape), halves = rectangle, []
    for offset, length in ((0, at), (at, shape[dim] - at)):
        half = Rectangle(
            (*start[:dim], start[dim] + offset, *start[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :])
        )
        halves += tiles(draw, half, cuts - 1)
    return halves


def where(rectangle, shape):
    return np.arange(math.prod(shape)).reshape(shape)[rectangle.slices_in(Rectangle((0,) * len(shape), shape))]


@given(st.data(), shapes)
def test_rectangles_of_a_flat_range_are_that_range(data, shape):
    count = math.prod(shape)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    seen = first
    parts = list(rectangles_of(shape, first, last))
    for part, flat in parts:
        assert flat == seen
        elements = where(part, shape).ravel()
        assert (elements == np.arange(flat, flat + part.size)).all()
        seen += part.size
    assert seen == last
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@given(st.data(), shapes)
def test_overlap_and_flat_range(data, shape):
    a, b = data.draw(rectangles(shape)), data.draw(rectangles(shape))
    both = np.intersect1d(where(a, shape), where(b, shape))
    shared = a.overlap(b)
    assert (shared is None) == (both.size == 0)
    if shared is not None:
        assert (where(shared, shape).ravel() == both).all()
        inside = np.arange(a.size).reshape(a.shape)[shared.slices_in(a)]
        assert shared.flat_range_in(a) == (inside.min(), inside.max() + 1)


@given(st.data(), shapes)
def test_tiling_fault_agrees_with_counting(data, shape):
    boxes = tiles(data.draw, Rectangle((0,) * len(shape), shape), 3)
    assert tiling_fault(shape, boxes) is None
    change = data.draw(st.sampled_from(["drop", "repeat", "move"]))
    index = data.draw(st.integers(0, len(boxes) - 1))
    if change == "drop":
        del boxes[index]
    elif change == "repeat":
        boxes.append(boxes[index])
    else:
        boxes[index] = data.draw(rectangles(shape))
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices_in(Rectangle((0,) * len(shape), shape))] += 1
    fault = tiling_fault(shape, boxes)
    if (counts == 1).all():
        assert fault is None
    else:
        first = [int(i) for i in np.argwhere(counts != 1)[0]]
        assert fault == f"element {first} lies in {'no box' if counts[tuple(first)] == 0 else 'more than one box'}"


def test_many_boxes_are_checked_in_linear_time():
    pieces = [Rectangle((0, column), (1, 1)) for column in range(20_000)]
    assert tiling_fault((1, 20_000), pieces) is None
    assert tiling_fault((1, 20_001), pieces) == "element [0, 20000] lies in no box"
