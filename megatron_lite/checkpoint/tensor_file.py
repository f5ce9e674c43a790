"""A safetensors file that somebody else wrote: its header checked, its tensors read by rectangles.

Nothing in it is trusted: the header is JSON of bounded size, its tensors tile the rest of the file, and what is read is
exactly the bytes that were asked for, but for gaps that are too short to be worth leaving out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.manifest import ITEM_BYTES, open_regular
from megatron_lite.checkpoint.piece import DTYPES
from megatron_lite.errors import CheckpointError

_MAX_HEADER_BYTES = 100 * 10**6
_MAX_NAME = 500
_MAX_DIMS = 8
_CHUNK_BYTES = 4 * 2**20
_SHORT_GAP_BYTES = 4096
"""A page: leaving out less of a file saves no reading."""

_OTHER_ITEM_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
"""Dtypes of the format that no checkpoint here holds; such a tensor may lie in a file unread."""


class FileTensor(NamedTuple):
    """One tensor of a file: its bytes are row-major and little-endian from `first_byte` on."""

    dtype: str
    shape: tuple[int, ...]
    first_byte: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (ITEM_BYTES | _OTHER_ITEM_BYTES)[self.dtype]


class TensorFile(contextlib.AbstractContextManager):
    """The tensors of one file by name. Raises CheckpointError for a file that cannot be read or is none of this form.

    `path` is opened as a plain file; links are for the caller to follow.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self.tensors = self._header()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def read(self, name: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        """Copy a rectangle of a vector or matrix into a tensor of its shape, which may be a view of any dtype."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is {tensor.dtype}; only {', '.join(DTYPES)} can be read")
        if len(tensor.shape) not in (1, 2):
            raise CheckpointError(f"{self.path}: {name} has shape {list(tensor.shape)}, not one or two dims")
        if len(tensor.shape) == 1:
            # A row of its own.
            tensor = tensor._replace(shape=(1, *tensor.shape))
            rectangle, into = Rectangle((0, *rectangle.start), (1, *rectangle.shape)), into.unsqueeze(0)
        item, (rows, columns) = ITEM_BYTES[tensor.dtype], rectangle.shape
        row_bytes, held_bytes = tensor.shape[1] * item, columns * item
        first = tensor.first_byte + rectangle.start[0] * row_bytes + rectangle.start[1] * item
        apart = row_bytes - held_bytes > _SHORT_GAP_BYTES
        stride = held_bytes if apart else row_bytes
        at_once = max(1, _CHUNK_BYTES // stride)
        for row in range(0, rows, at_once):
            count = min(at_once, rows - row)
            if apart:
                places = [first + (row + i) * row_bytes for i in range(count)]
                raw = self._bytes((place, held_bytes) for place in places)
            else:
                raw = self._bytes([(first + row * row_bytes, (count - 1) * row_bytes + held_bytes)])
            values = torch.frombuffer(raw, dtype=DTYPES[tensor.dtype])
            into[row : row + count].copy_(values.as_strided((count, columns), (stride // item, 1)))

    def _bytes(self, ranges: Iterable[tuple[int, int]]) -> bytearray:
        """The bytes of some (first, length) of the file, one after another."""
        ranges = list(ranges)
        raw = bytearray(sum(length for _, length in ranges))
        view, at = memoryview(raw), 0
        for first, length in ranges:
            end = at + length
            while at < end:
                try:
                    count = os.preadv(self._file.fileno(), [view[at:end]], first + length - (end - at))
                except OSError as error:
                    raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
                if count == 0:
                    raise CheckpointError(f"{self.path} was cut off while it was read")
                at += count
        return raw

    def _header(self) -> dict[str, FileTensor]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._bytes([(0, 8)]), "little") if size >= 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{self.path} is not a safetensors file, or is cut off: its {size} bytes begin with a header length of "
                f"{length}"
            )
        try:
            content = json.loads(self._bytes([(8, length)]).decode(), object_pairs_hook=_unique)
            if not isinstance(content, dict):
                raise ValueError("the header is not a JSON object")
            content.pop("__metadata__", None)
            tensors = {name: _file_tensor(name, entry, 8 + length) for name, entry in content.items()}
            end = 8 + length
            for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].first_byte, item[1].nbytes)):
                if tensor.first_byte != end:
                    raise ValueError(f"{name} begins at byte {tensor.first_byte}, where {end} is the next")
                end += tensor.nbytes
            if end != size:
                raise ValueError(f"its tensors end at byte {end}, and the file at {size}")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {str(error)[:300]}; it is damaged, or no safetensors file") from None
        return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _file_tensor(name: str, entry: Any, base: int) -> FileTensor:
    if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
        raise ValueError(f"{name[:60]!r} is no name for a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES | _OTHER_ITEM_BYTES:
        raise ValueError(f"{name} has the dtype {str(dtype)[:60]!r}")
    for numbers, most in ((shape, _MAX_DIMS), (offsets, 2)):
        plain = isinstance(numbers, list) and len(numbers) <= most
        if not plain or not all(type(n) is int and 0 <= n < 2**53 for n in numbers):
            raise ValueError(f"{name} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}")
    tensor = FileTensor(dtype, tuple(shape), base + offsets[0] if offsets else 0)
    if len(offsets) != 2 or offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{name} has {tensor.nbytes} bytes by its shape and data_offsets {offsets}")
    return tensor


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The beginning of a file that holds tensors, each of a (dtype, shape), one after another in that order."""
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        first, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
