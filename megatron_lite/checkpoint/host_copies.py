"""Copies of pieces in host memory, which are saved while training goes on to change the originals.

Weights and optimizer state change in the optimizer step alone, so copying runs beside the forward and backward
pass that follow, and only the step after it may have to wait. The idea is CheckFreq's (Mohan et al. 2021).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_lite import log
from megatron_lite.checkpoint.piece import Piece

_ALIGNMENT = 64


class HostCopies:
    """Host memory for a copy of what this rank owns of `pieces`, page-locked where they lie on a GPU.

    It is kept from one save to the next. Raises RuntimeError where there is not enough memory.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self.nbytes = sum(_padded(tensor.nbytes) for piece in _owned(pieces) for tensor in _tensors(piece).values())
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8)
        self._copies, at = [], 0
        for piece in _owned(pieces):
            held = {}
            for name, tensor in _tensors(piece).items():
                held[name] = self._memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                at += _padded(tensor.nbytes)
            self._copies.append(dataclasses.replace(piece, **held))
        device = next((piece.tensor.device for piece in pieces if piece.tensor.is_cuda), None)
        self._stream = None
        if device is not None:
            self._stream = torch.cuda.Stream(device)
            self._lock_pages()

    def begin(self, pieces: Callable[[], Sequence[Piece]]) -> Copying:
        """Copy the same pieces as they are now; the copies before are no longer used by anyone.

        They are asked for by the thread that copies: naming thousands takes a while.
        """
        return Copying(self._copies, pieces, self._stream)

    def _lock_pages(self) -> None:
        # Registered and not allocated as such: torch rounds page-locked memory up to a power of two.
        failure = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self.nbytes, 0)
        if self.nbytes and failure:
            log.once(f"host memory cannot be page-locked ({failure}): saves are copied to it more slowly")


class Copying:
    """Copies on their way, by the thread that calls `finish`, from a GPU by a side stream."""

    def __init__(self, copies: list[Piece], pieces: Callable[[], Sequence[Piece]], stream: torch.cuda.Stream | None):
        self._copies = copies
        self._pieces = pieces
        self._stream = stream
        # What the GPU has been given to do until now comes before the copies.
        self._ready = None if stream is None else torch.cuda.current_stream(stream.device).record_event()
        self._arrival: torch.cuda.Event | None = None
        self._begun = threading.Event()

    def finish(self) -> list[Piece]:
        """The pieces as copies, once all have arrived."""
        try:
            if self._stream is None:
                self._move()
            else:
                self._stream.wait_event(self._ready)
                with torch.cuda.stream(self._stream):
                    self._move()
                self._arrival = self._stream.record_event()
        finally:
            self._begun.set()
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies

    def allow_change(self) -> None:
        """Return when the originals may change: on a GPU once the copies are under way, whose own work then waits for
        them."""
        self._begun.wait()
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)

    @torch.no_grad()
    def _move(self) -> None:
        for copy, piece in zip(self._copies, _owned(self._pieces()), strict=True):
            into = _tensors(copy)
            for name, source in _tensors(piece).items():
                into[name].copy_(source, non_blocking=True)


def _owned(pieces: Sequence[Piece]) -> Iterator[Piece]:
    return (piece for piece in pieces if piece.owned)


def _tensors(piece: Piece) -> dict[str, torch.Tensor]:
    """The tensors a piece consists of, by field."""
    coded = {} if piece.absmax is None else {"absmax": piece.absmax}
    return {"tensor": piece.tensor, **coded}


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
