"""Weights in another project's checkpoint: which rectangle of whose tensor is which of ours.

A fused weight of theirs, or of ours, is several rectangles. Reading is by rectangles too: a rank reads of each of
their tensors what it needs, and a conversion one of our tensors at a time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from megatron_lite.checkpoint.boxes import Rectangle, tiling_fault
from megatron_lite.checkpoint.piece import DTYPES, Piece
from megatron_lite.errors import CheckpointError

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Link:
    """A rectangle of one of our parameters, of `shape` from `our_start` on, and where it lies in their tensor."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    our_start: tuple[int, ...]
    their_start: tuple[int, ...]
    transposed: bool = False
    """They keep a matrix as [input, output]."""

    @property
    def our_rectangle(self) -> Rectangle:
        return Rectangle(self.our_start, self.shape)

    @property
    def their_rectangle(self) -> Rectangle:
        return Rectangle(self.their_start, self.shape[::-1] if self.transposed else self.shape)

    def part(self, rectangle: Rectangle) -> Rectangle:
        """Where a part of `our_rectangle` lies in their tensor."""
        offset = tuple(a - b for a, b in zip(rectangle.start, self.our_start, strict=True))
        shape = rectangle.shape
        if self.transposed:
            offset, shape = offset[::-1], shape[::-1]
        return Rectangle(tuple(a + b for a, b in zip(self.their_start, offset, strict=True)), shape)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A part of ours as theirs lies, and back."""
        return tensor.mT if self.transposed else tensor


def whole(ours: str, theirs: str, *shape: int, transposed: bool = False) -> Link:
    """All of one of our parameters, which is all of one of theirs."""
    origin = (0,) * len(shape)
    return Link(ours, theirs, shape, origin, origin, transposed and len(shape) == 2)


def rows(ours: str, our_row: int, theirs: str, their_row: int, *shape: int, transposed: bool = False) -> Link:
    """Outputs of a layer, `shape[0]` of them, from a row of ours and of theirs on."""
    rest = (0,) * (len(shape) - 1)
    transposed = transposed and len(shape) == 2
    their_start = (*rest, their_row) if transposed else (their_row, *rest)
    return Link(ours, theirs, shape, (our_row, *rest), their_start, transposed)


def widest(names: Iterable[str]) -> torch.dtype:
    """The dtype that holds all numbers of some, given by their safetensors names. Raises CheckpointError."""
    found: torch.dtype | None = None
    for name in names:
        if name not in DTYPES:
            raise CheckpointError(f"a weight is {name}; only {', '.join(DTYPES)} can be read")
        found = DTYPES[name] if found is None else torch.promote_types(found, DTYPES[name])
    assert found is not None
    return found


class Source(Protocol):
    """Somebody's tensors, read by rectangles."""

    name: str

    def dtype(self, theirs: str) -> str:
        """A tensor's dtype, by its safetensors name."""
        ...

    def read(self, theirs: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        """Copy a rectangle of a tensor into a view."""
        ...


def by_ours(links: Iterable[Link]) -> dict[str, list[Link]]:
    """Parameter name -> the links it is made of. Raises ValueError where they do not tile it."""
    found: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        found[link.ours].append(link)
    for name, parts in found.items():
        if fault := tiling_fault(shape_of(parts), [part.our_rectangle for part in parts]):
            raise ValueError(f"{name}: {fault}")
    return found


def shape_of(parts: Sequence[Link]) -> tuple[int, ...]:
    """The shape of the parameter that links make up."""
    return _extent(part.our_rectangle for part in parts)


def their_shapes(links: Iterable[Link]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of their tensors that links take whole."""
    found: dict[str, list[Rectangle]] = defaultdict(list)
    for link in links:
        found[link.theirs].append(link.their_rectangle)
    return {name: _extent(rectangles) for name, rectangles in found.items()}


def _extent(rectangles: Iterable[Rectangle]) -> tuple[int, ...]:
    ends = [tuple(a + n for a, n in zip(box.start, box.shape, strict=True)) for box in rectangles]
    return tuple(max(along) for along in zip(*ends, strict=True))


def compare_shapes(
    name: str, there: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], known: Callable[[str], bool]
) -> None:
    """Raise CheckpointError unless `there` are the tensors that are wanted, and others that are `known` to be idle."""
    differing = [
        f"{key} is {list(there[key])}, not {list(shape)}"
        for key, shape in wanted.items()
        if key in there and there[key] != shape
    ]
    missing = [key for key in wanted if key not in there]
    unknown = [key for key in there if key not in wanted and not known(key)]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for keys, what in (
            (missing, "tensors are missing"),
            (unknown, "tensors belong to no part of this model"),
            (differing, "tensors have another shape than its configuration says"),
        )
        if keys
    ]
    if parts:
        raise CheckpointError(f"{name} does not hold the model it describes: {'; '.join(parts)}.")


def fill(source: Source, parts: Sequence[Link], rectangle: Rectangle, into: torch.Tensor) -> None:
    """Read a rectangle of one of our parameters, made up of links, into a tensor of its shape."""
    for link in parts:
        if shared := rectangle.overlap(link.our_rectangle):
            source.read(link.theirs, link.part(shared), link.view(into[shared.slices_in(rectangle)]))


def fill_pieces(source: Source, links: Mapping[str, Sequence[Link]], pieces: Sequence[Piece]) -> None:
    """Read what `pieces` of weights want, in place. Raises CheckpointError for a weight that is of no link."""
    for piece in pieces:
        name = piece.name.removeprefix("weight/")
        if name not in links or shape_of(links[name]) != piece.global_shape:
            held = f"{list(shape_of(links[name]))} there" if name in links else "not there"
            raise CheckpointError(f"{source.name}: {name} is {held} and {list(piece.global_shape)} here")
        fill(source, links[name], piece.rectangle, piece.tensor)


@dataclasses.dataclass(frozen=True)
class PieceToCome(Piece):
    """A whole weight of a foreign checkpoint, read when it is written: `tensor` tells shape and dtype alone."""

    source: Source | None = None
    parts: tuple[Link, ...] = ()

    def bytes_view(self) -> memoryview:
        values = torch.empty(self.global_shape, dtype=self.tensor.dtype)
        fill(self.source, self.parts, self.rectangle, values)
        return memoryview(values.view(-1).view(torch.uint8).numpy())


def pieces_to_come(
    source: Source, links: Mapping[str, Sequence[Link]], dtype: torch.dtype | None = None
) -> list[PieceToCome]:
    """All weights of a foreign checkpoint for `save`, in `dtype` or each in the one it is stored in."""
    found = []
    for name, parts in links.items():
        shape = shape_of(parts)
        stored = widest(source.dtype(part.theirs) for part in parts)
        empty = torch.empty(shape, dtype=dtype or stored, device="meta")
        origin = (0,) * len(shape)
        found.append(PieceToCome(f"weight/{name}", shape, origin, empty, True, source=source, parts=tuple(parts)))
    return found
