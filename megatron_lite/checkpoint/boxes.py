"""Rectangles of a row-major tensor: overlaps, flat ranges and exact tilings. Integers alone, no torch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Rectangle(NamedTuple):
    """The elements from `start` on, `shape` of them along each dim, of some larger tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Rectangle) -> Rectangle | None:
        """What lies in both, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True))
        shape = tuple(end - first for first, end in zip(start, stop, strict=True))
        return Rectangle(start, shape) if all(length > 0 for length in shape) else None

    def slices_in(self, outer: Rectangle) -> tuple[slice, ...]:
        """How to index a tensor that holds `outer` to get this part of it."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.start, self.shape, outer.start, strict=True))

    def flat_range_in(self, outer: Rectangle) -> tuple[int, int]:
        """The first flat index of this part in a row-major `outer`, and one past the last."""
        first = last = 0
        for a, n, b, length in zip(self.start, self.shape, outer.start, outer.shape, strict=True):
            first = first * length + a - b
            last = last * length + a - b + n - 1
        return first, last + 1

    def moved(self, by: tuple[int, ...]) -> Rectangle:
        """The same shape, its start shifted by `by`."""
        return Rectangle(tuple(a + b for a, b in zip(self.start, by, strict=True)), self.shape)

    def __str__(self) -> str:
        """Slice notation: `[0:128,64:192]`."""
        return "[" + ",".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape, strict=True)) + "]"


def rectangles_of(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[Rectangle, int]]:
    """Elements [first, last) of a flattened tensor as rectangles, each with its first flat index.

    At most 2·dims - 1 of them: the end of a row, whole rows, the beginning of a row, and so inward.
    """
    if not shape:
        if first < last:
            yield Rectangle((), ()), first
        return
    row, inner = math.prod(shape[1:]), shape[1:]
    while first < last:
        line, column = divmod(first, row)
        lines = (last - first) // row
        if column == 0 and lines:
            yield Rectangle((line, *(0 for _ in inner)), (lines, *inner)), first
            first += lines * row
        else:
            until = min(last, (line + 1) * row)
            for part, flat in rectangles_of(inner, column, column + until - first):
                yield Rectangle((line, *part.start), (1, *part.shape)), line * row + flat
            first = until


def tiling_fault(shape: tuple[int, ...], boxes: Iterable[Rectangle]) -> str | None:
    """What keeps `boxes` from covering every element of `shape` exactly once, or None.

    Linear in the number of boxes. A box's indicator function is the running sum, along each dim, of
    ±1 at its corners, so the boxes tile the tensor exactly when their corners add up to the tensor's
    own; and the first corner that does not is an element that lies in no box, or in several.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    whole, boxes = Rectangle((0,) * len(shape), shape), list(boxes)
    if boxes == [whole]:
        return None
    for rectangle, weight in itertools.chain([(whole, -1)], ((box, 1) for box in boxes)):
        ends = ((a, a + n) for a, n in zip(rectangle.start, rectangle.shape, strict=True))
        for index, corner in enumerate(itertools.product(*ends)):
            corners[corner] += -weight if index.bit_count() % 2 else weight
    wrong = min((corner for corner, weight in corners.items() if weight), default=None)
    if wrong is None:
        return None
    where = "in no box" if corners[wrong] < 0 else "in more than one box"
    return f"element {list(wrong)} lies {where}"
