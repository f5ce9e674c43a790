"""How a parameter lies on the mesh, stated once where the layer makes it.

Initialisation, checkpoints, gradient norm, optimizer groups and the planner read it from
`parameter.mesh_layout` (torch has a `layout` of its own). Global shapes and names never depend on the
mesh: padding of the vocabulary lies in no box, a fused weight is several boxes, and key/value heads
may be held by several ranks.
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle of a parameter, of the same shape in the global and in the local tensor."""

    global_start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A rectangle of the global tensor that is contiguous in the flattened local one.

    Its `math.prod(shape)` values lie from `flat_start` on in row-major order.
    """

    global_start: tuple[int, ...]
    shape: tuple[int, ...]
    flat_start: int


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """Where this rank's part of one parameter lies in the global parameter."""

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    is_split: bool
    """Differs between tensor ranks (DeepSpeed's `model_parallel`)."""
    is_owner: bool
    """First of the tensor ranks that hold these boxes: the one that counts and writes them."""

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the global `tensor`, zero where no box lies."""
        if tuple(tensor.shape) != self.global_shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {self.global_shape} is laid out")
        local = tensor.new_zeros(self.local_shape)
        for box in self.boxes:
            local[_slices(box.local_start, box.shape)] = tensor[_slices(box.global_start, box.shape)]
        return local

    def parts(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Views of the boxes of `local`: all of it but padding."""
        return [local[_slices(box.local_start, box.shape)] for box in self.boxes]

    def fragments(self, start: int = 0, stop: int | None = None) -> list[Fragment]:
        """What elements [start, stop) of the flattened local tensor are in the global one.

        ZeRO cuts the flattened parameter anywhere; a cut inside a row gives up to three rectangles
        a box. `flat_start` counts from the beginning of the flattened local tensor.
        """
        stop = math.prod(self.local_shape) if stop is None else stop
        found = []
        for box in self.boxes:
            found += _box_fragments(box, self.local_shape, start, stop)
        return found


def replicated(shape: tuple[int, ...], rank: int) -> ParameterLayout:
    """A parameter that every tensor rank holds whole."""
    origin = (0,) * len(shape)
    return ParameterLayout(shape, shape, (Box(origin, origin, shape),), is_split=False, is_owner=rank == 0)


def split(
    shape: tuple[int, ...],
    dim: int,
    rank: int,
    size: int,
    *,
    sections: tuple[int, ...] | None = None,
    padded: int | None = None,
    replicas: int = 1,
) -> ParameterLayout:
    """A parameter split along `dim` over `size` tensor ranks.

    `sections` are lengths along `dim` (query and so on, or gate and up) that are each split evenly.
    `padded` is the length along `dim` that is split when it exceeds the global one (vocabulary).
    `replicas` neighbouring ranks hold the same part (key/value heads fewer than ranks).
    """
    if padded is not None and (sections is not None or replicas != 1):
        raise ValueError("padding goes with one section and no replicas")
    part, parts = rank // replicas, size // replicas
    boxes = []
    local_offset = global_offset = 0
    for length in sections or (padded or shape[dim],):
        if length % parts:
            raise ValueError(f"{length} along dim {dim} is not divisible by {parts}")
        local_length = length // parts
        first = global_offset + part * local_length
        held = max(0, min(local_length, shape[dim] - first))
        if held:
            boxes.append(
                Box(
                    _at(dim, first, len(shape)),
                    _at(dim, local_offset, len(shape)),
                    (*shape[:dim], held, *shape[dim + 1 :]),
                )
            )
        local_offset += local_length
        global_offset += length
    return ParameterLayout(
        tuple(shape),
        (*shape[:dim], local_offset, *shape[dim + 1 :]),
        tuple(boxes),
        is_split=parts > 1,
        is_owner=rank % replicas == 0,
    )


def _at(dim: int, value: int, dims: int) -> tuple[int, ...]:
    return tuple(value if i == dim else 0 for i in range(dims))


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def _box_fragments(box: Box, local_shape: tuple[int, ...], start: int, stop: int) -> list[Fragment]:
    """The part of `box` in the flat interval [start, stop).

    A box covers whole rows of the local tensor (every dim but the first in full), so the interval
    meets it in one run: the end of a row, whole rows, and the beginning of a row.
    """
    if box.shape[1:] != local_shape[1:] or any(box.local_start[1:]):
        raise ValueError(f"box {box} does not cover whole rows of a local tensor {local_shape}")
    row = math.prod(local_shape[1:])
    first = max(start, box.local_start[0] * row)
    last = min(stop, (box.local_start[0] + box.shape[0]) * row)
    pieces = []
    while first < last:
        line, column = divmod(first, row)
        if len(local_shape) == 1 or (column == 0 and last - first >= row):
            length = (last - first) // row * row
            shape = (length // row, *local_shape[1:])
            inner = (0,) * (len(local_shape) - 1)
        else:
            length = min(last - first, row - column)
            if len(local_shape) != 2:
                raise ValueError("parameters have one or two dims")
            shape, inner = (1, length), (column,)
        offset = (line - box.local_start[0], *inner)
        where = tuple(a + b for a, b in zip(box.global_start, offset, strict=True))
        pieces.append(Fragment(where, shape, first))
        first += length
    return pieces
