"""Values on their way from stored boxes into a piece: as they are, or into and out of 8-bit codes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.manifest import CODE_DTYPES, ITEM_BYTES, StoredBox, StoredTensor, absmax_bytes
from megatron_lite.checkpoint.piece import DTYPES, Piece
from megatron_lite.kernels.code_maps import BLOCK, blocks
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise, keep_above_zero, quantize_blockwise


class Values:
    """Elements [first, last) of a flattened box, as they were read; the bytes are not kept for longer."""

    def __init__(self, dtype: str, raw: memoryview, absmax: torch.Tensor, first: int):
        self._dtype = dtype
        self._absmax = absmax
        self.stored = torch.frombuffer(raw, dtype=DTYPES.get(dtype, torch.uint8))
        """In the stored dtype: codes, where it is one of codes."""
        self.first, self.last = first, first + len(self.stored)

    @functools.cached_property
    def numbers(self) -> torch.Tensor:
        """What is stored, or what the codes stand for."""
        if self._dtype not in CODE_DTYPES:
            return self.stored
        # Dequantised in whole blocks, the first of which may have begun before.
        lead = self.first % BLOCK
        codes = torch.cat([self.stored.new_zeros(lead), self.stored])
        absmax = self._absmax[self.first // BLOCK :][: blocks(len(codes))]
        return dequantize_blockwise(codes, absmax, signed=CODE_DTYPES[self._dtype])[lead:]


class Taking(NamedTuple):
    """The part of a box that an arrival takes."""

    arrival: Arrival
    first: int
    """It lies among bytes [first, last) of the box."""
    last: int
    memory: memoryview | None
    """Where those bytes go just as they are: None if they are converted, or are no single run here or there."""

    def memory_of(self, first: int, last: int) -> memoryview | None:
        """Where bytes [first, last) of the box go, if all of them go somewhere as they are."""
        if self.memory is None or first < self.first or self.last < last:
            return None
        return self.memory[first - self.first : last - self.first]


class Arrival:
    """A piece and what it takes of stored boxes.

    A block of 8-bit codes that is a block of a stored box as well, the same elements in the same order, is
    taken as it is. All others are quantised anew from the numbers that are stored: off by at most half the
    distance of two codes, but that a number above 0 keeps the smallest code above 0 where the piece says so.
    """

    def __init__(self, piece: Piece, stored: StoredTensor):
        self.rectangle = piece.rectangle
        self._piece = piece
        self._dtype, self._item = stored.dtype, ITEM_BYTES[stored.dtype]
        self._numbers: torch.Tensor | None = piece.tensor.detach()
        is_plain = piece.tensor.device.type == "cpu" and piece.tensor.is_contiguous() and piece.absmax is None
        self._memory = piece.bytes_view() if is_plain and stored.dtype == piece.dtype_name else None
        self._codes: torch.Tensor | None = None
        self._shared: dict[StoredBox, tuple[torch.Tensor, torch.Tensor]] = {}
        if piece.absmax is None:
            return
        self._anew = torch.ones(len(piece.absmax), dtype=torch.bool)
        if stored.dtype == piece.dtype_name:
            self._codes = piece.tensor
            for box in stored.boxes:
                if self.rectangle.overlap(box.rectangle):
                    self._shared[box] = here, _ = shared_blocks(self.rectangle, box.rectangle)
                    self._anew[here] = False
        self._numbers = torch.zeros(piece.tensor.shape) if self._anew.any() else None

    def taking(self, box: StoredBox) -> Taking | None:
        """What is taken of a box, if anything is."""
        shared = self.rectangle.overlap(box.rectangle)
        if shared is None:
            return None
        memory, (first, last) = None, shared.flat_range_in(box.rectangle)
        if self._memory is not None and last - first == shared.size:
            here, end = shared.flat_range_in(self.rectangle)
            if end - here == shared.size:
                memory = self._memory[here * self._item : end * self._item]
        head = absmax_bytes(self._dtype, box.rectangle.size)
        return Taking(self, head + first * self._item, head + last * self._item, memory)

    def take(self, shared: Rectangle, source: Rectangle, values: Values, flat: int) -> None:
        """Copy the rectangle `shared` out of `source`, which is `values` from element `flat` of its box on."""
        first = flat - values.first
        for into, face in ((self._codes, "stored"), (self._numbers, "numbers")):
            if into is not None:
                held = getattr(values, face)[first : first + source.size].view(source.shape)
                into[shared.slices_in(self.rectangle)].copy_(held[shared.slices_in(source)])

    def take_absmax(self, box: StoredBox, absmax: torch.Tensor) -> None:
        """Copy the absmax of the blocks that are the box's as well."""
        if self._shared and box in self._shared:
            here, there = self._shared[box]
            self._piece.absmax[here] = absmax[there].to(self._piece.absmax.device)

    def finish(self) -> None:
        """Quantise what has to be, once all boxes have been taken from."""
        piece = self._piece
        if piece.absmax is None or self._numbers is None:
            return
        codes, absmax = quantize_blockwise(self._numbers, signed=piece.signed)
        if piece.keeps_above_zero:
            codes = keep_above_zero(codes, self._numbers)
        elements = self._anew.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
        for into, new, where in ((piece.tensor, codes, elements), (piece.absmax, absmax, self._anew)):
            into.copy_(torch.where(where.to(into.device), new.to(into.device), into))


def shared_blocks(piece: Rectangle, box: Rectangle) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of the flattened `piece` that are blocks of the flattened `box`: their indices here and there."""
    offsets = [a - b for a, b in zip(piece.start, box.start, strict=True)]
    # Dims at the end that both hold alike make lines, together with the dim before them.
    dim = max(0, len(offsets) - 1)
    while dim > 0 and offsets[dim] == 0 and piece.shape[dim] == box.shape[dim]:
        dim -= 1
    step = math.prod(piece.shape[dim + 1 :])
    width, width_there = math.prod(piece.shape[dim:]), math.prod(box.shape[dim:])
    first = torch.arange(0, piece.size, BLOCK)
    length = (piece.size - first).clamp(max=BLOCK)
    line, column = first // width, first % width
    # Elements in one line are neighbours in both; those of two lines are not, since the lines differ.
    shared = column + length <= width
    column += sum(offsets[dim : dim + 1]) * step
    shared &= (column >= 0) & (column + length <= width_there)
    first_there, stride = column, width_there
    for outer in reversed(range(dim)):
        index = line % piece.shape[outer] + offsets[outer]
        shared &= (index >= 0) & (index < box.shape[outer])
        first_there = first_there + index * stride
        line, stride = line // piece.shape[outer], stride * box.shape[outer]
    shared &= (first_there % BLOCK == 0) & (length == (box.size - first_there).clamp(max=BLOCK))
    return shared.nonzero().flatten(), first_there[shared] // BLOCK
