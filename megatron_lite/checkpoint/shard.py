"""One rank's file, in the safetensors format: eight bytes of header length, a JSON header, the values.

A box of a tensor is stored row-major, little-endian, under the tensor's name followed by its place in
slice notation (`weight/embedding.weight[0:512,0:64]`), or under the name alone if it is the whole tensor.
8-bit codes have no dtype in that format: such a box is so many bytes there, and the manifest says what they are.
Every chunk of a box has a CRC-32 in the manifest, so a reader checks just what it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from megatron_lite.checkpoint.manifest import (
    CHUNK_BYTES,
    ITEM_BYTES,
    Manifest,
    StoredBox,
    box_entry,
    file_entry,
    open_regular,
)
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.errors import CheckpointError
from megatron_lite.kernels.crc32 import crc32

Task = TypeVar("Task")

_MOST_OPEN_FILES = 128
_READERS = 4
_BLOCK_BYTES = 2**18
"""What a processor's cache still holds when its checksum is taken after it was read."""
_FLUSH_BYTES = 8 * 2**20
"""How much is written before the disk is told to begin with it."""
_SYNC_FILE_RANGE_WRITE = 2
_OF_THIS_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Why a file cannot be opened that says nothing against the file."""


class _Placed(NamedTuple):
    """A piece and the bytes [first, last) of the file it goes to."""

    piece: Piece
    first: int
    last: int


class ShardPlan:
    """What a rank's file will hold, decided before a byte is written: header, ranges, size.

    Pieces of zero elements and those owned elsewhere take no part; a rank left with none has `size` 0
    and writes no file.
    """

    def __init__(self, pieces: Sequence[Piece], step: int):
        # Widest values first, so that every tensor is aligned to its own item.
        held = sorted(
            (piece for piece in pieces if piece.owned and piece.tensor.numel()),
            key=lambda piece: (-ITEM_BYTES[piece.dtype_name], piece.name, piece.global_start),
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step)}}
        ends = [0]
        for piece in held:
            ends.append(ends[-1] + piece.nbytes)
            is_whole, is_coded = piece.rectangle.shape == piece.global_shape, piece.absmax is not None
            header[piece.name if is_whole else f"{piece.name}{piece.rectangle}"] = {
                "dtype": "U8" if is_coded else piece.dtype_name,
                "shape": (piece.nbytes,) if is_coded else piece.rectangle.shape,
                "data_offsets": ends[-2:],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        base = len(self.header)
        self.size = base + ends[-1] if held else 0
        self.placed = [
            _Placed(piece, base + a, base + b) for piece, a, b in zip(held, ends[:-1], ends[1:], strict=True)
        ]

    def write(self, path: Path, deadline: Callable[[], float | None] = lambda: None) -> dict[str, Any]:
        """Write the file and make it durable; its `files` and `tensors` entries for the manifest.

        Straight from the pieces' memory, chunk by chunk. `deadline` gives the time.monotonic() value past
        which it gives up. Raises OSError (TimeoutError past the deadline).
        """
        if not self.placed:
            return {"files": {}, "tensors": {}}
        tensors: dict[str, Any] = {}
        try:
            with open(path, "xb") as file, ThreadPoolExecutor(1, "checksums") as beside:
                file.write(self.header)
                for piece, first, last in self.placed:
                    checksums = _write_chunks(file, piece.bytes_view(), deadline, beside)
                    entry = {"dtype": piece.dtype_name, "shape": list(piece.global_shape), "boxes": []}
                    tensors.setdefault(piece.name, entry)["boxes"].append(
                        box_entry(piece.rectangle, path.name, first, last, checksums)
                    )
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        entry = file_entry(self.size, len(self.header), crc32(self.header))
        return {"files": {path.name: entry}, "tensors": tensors}


def keep_to(deadline: Callable[[], float | None]) -> None:
    """Raise TimeoutError past the time.monotonic() value that `deadline` gives, if it gives one."""
    if (end := deadline()) is not None and time.monotonic() > end:
        raise TimeoutError(errno.ETIMEDOUT, "the time for this save is used up")


def _write_chunks(
    file: BinaryIO, values: memoryview, deadline: Callable[[], float | None], beside: ThreadPoolExecutor
) -> list[int]:
    """Write chunk by chunk; their checksums, of all but short ones taken on another thread meanwhile."""
    checksums = []
    for first in range(0, len(values), CHUNK_BYTES):
        keep_to(deadline)
        chunk = values[first : first + CHUNK_BYTES]
        taken = beside.submit(crc32, chunk) if len(chunk) > _BLOCK_BYTES else None
        _write(file, chunk)
        checksums.append(taken.result() if taken else crc32(chunk))
    return checksums


def _write(file: BinaryIO, values: memoryview) -> None:
    """Write, and let the disk begin whenever there is enough for it to do."""
    before = file.tell() // _FLUSH_BYTES
    file.write(values)
    if file.tell() // _FLUSH_BYTES > before:
        _begin_flush(file)


@functools.cache
def _sync_file_range() -> Callable[[int, ctypes.c_int64, ctypes.c_int64, int], int] | None:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _begin_flush(file: BinaryIO) -> None:
    """Let the disk begin with what has been written so far: a hint, of no consequence where it is not understood."""
    if (begin := _sync_file_range()) is not None:
        begin(file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


class ShardReader(contextlib.AbstractContextManager):
    """The files of one checkpoint, opened when first read; whatever is handed out has been checked.

    Its methods raise CheckpointError, and OSError where this process can open no file at all.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._manifest = manifest
        self._open: dict[str, BinaryIO] = {}
        self._checked: set[str] = set()
        self._buffer = bytearray(manifest.chunk_bytes)

    def __exit__(self, *exc_info: object) -> None:
        for file in self._open.values():
            file.close()

    def check_file(self, name: str) -> None:
        """Check that the file is there, a plain one, of its size, with its header."""
        if name in self._checked:
            return
        entry = self._manifest.files[name]
        size = os.fstat(self._file(name).fileno()).st_size
        if size != entry.size:
            raise CheckpointError(f"{self._folder / name} has {size} bytes, and the manifest says {entry.size}")
        self._read(name, 0, entry.header_size, entry.header_crc32)
        self._checked.add(name)

    def chunk(self, box: StoredBox, nbytes: int, index: int, into: memoryview | None = None) -> memoryview:
        """Bytes of chunk `index` of a box of `nbytes` in all, read to `into` or else valid until the next call.

        Raises CheckpointError naming file and byte range when the checksum differs.
        """
        self.check_file(box.file)
        first = index * self._manifest.chunk_bytes
        length = min(self._manifest.chunk_bytes, nbytes - first)
        return self._read(box.file, box.first_byte + first, length, box.crc32[index], into)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            if len(self._open) == _MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[name] = open_regular(self._folder / name)
            except OSError as error:
                if error.errno in _OF_THIS_PROCESS:
                    raise
                raise CheckpointError(f"{self._folder / name} cannot be read: {error.strerror}") from None
        return self._open[name]

    def _read(self, name: str, first: int, length: int, checksum: int, into: memoryview | None = None) -> memoryview:
        file = self._file(name)
        if into is None and length > len(self._buffer):
            self._buffer = bytearray(length)
        values = memoryview(self._buffer)[:length] if into is None else into
        done = found = 0
        while done < length:
            block = values[done : done + _BLOCK_BYTES]
            try:
                count = os.preadv(file.fileno(), [block], first + done)
            except OSError as error:
                raise CheckpointError(f"{self._folder / name} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self._folder / name} ends at byte {first + done}; it was cut off while read")
            found = crc32(block[:count], found)
            done += count
        if found != checksum:
            raise CheckpointError(
                f"{self._folder / name}: bytes {first} to {first + length - 1} do not match their checksum; "
                f"the file is damaged"
            )
        return values


def by_readers(
    folder: Path, manifest: Manifest, tasks: Iterable[Task], read: Callable[[ShardReader, Task], None]
) -> None:
    """Call `read(reader, task)` for every task, begun in their order on a few threads: checksums, copies and disks go
    on side by side. Raises what the first thread that fails raises, once all have ended; they end early then, and when
    the caller is interrupted."""
    left = deque(tasks)

    def work() -> None:
        try:
            with ShardReader(folder, manifest) as reader:
                for task in _taken(left):
                    read(reader, task)
        except BaseException:
            left.clear()
            raise

    count = min(_READERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count, "read-checkpoint") as pool:
        reading = None
        try:
            for reading in [pool.submit(work) for _ in range(count)]:
                reading.result()
        finally:
            # Who interrupts this waits for what is being read, not for all that is left.
            left.clear()
            # Its error's traceback holds this frame: as a cycle the two would keep all that the callers hold.
            del reading


def _taken(tasks: deque[Task]) -> Iterator[Task]:
    """Tasks taken one by one off a queue that other threads take from as well."""
    while True:
        try:
            task = tasks.popleft()
        except IndexError:
            return
        yield task
