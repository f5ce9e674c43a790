"""The unpacked bytes of a source, local, remote or on standard input, and how much was read for them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from megatron_lite.data.text_input import FORMATS, STANDARD_INPUT, Source, reading
from megatron_lite.errors import DataError

_READ_BYTES = 1 << 17
_ZSTD_LEAST, _ZSTD_MOST, _ZSTD_LARGE = 1 << 7, 1 << 11, 1 << 20
_BOM = b"\xef\xbb\xbf"
_BEGINS = (
    (rb"\x1f\x8b\x08", "gz"),
    (rb"\x28\xb5\x2f\xfd", "zst"),
    (rb"BZh[1-9]1AY&SY", "bz2"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"PAR1", "parquet"),
)
"""How what is no text begins, and what it is."""


class CountedStream:
    """A stream that knows how much was read from it: pipes have no position."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.position += len(data)
        return data


@contextlib.contextmanager
def opened(source: Source) -> Iterator[CountedStream]:
    """The packed bytes of a source. Raises DataError if it cannot be opened."""
    with contextlib.ExitStack() as opened_here:
        with reading(source.name):
            stream = _raw(source)
            if source.path != STANDARD_INPUT:
                opened_here.enter_context(contextlib.closing(stream))
        yield CountedStream(stream)


def _raw(source: Source) -> Any:
    # Unbuffered: a buffered read waits for all it was asked for, and a signal that comes between two of its
    # system calls is not looked at before the pipe has more.
    if source.path == STANDARD_INPUT:
        return sys.stdin.buffer.raw
    if source.is_remote:
        import fsspec

        return fsspec.open(source.path, "rb").open()
    return open(source.path, "rb", buffering=0)


def chunks(raw: CountedStream, source: Source) -> Iterator[bytes]:
    """The unpacked bytes of a stream without a byte-order mark. Raises DataError for a source that is damaged or ends
    early inside its packing."""
    mark = _BOM
    try:
        with reading(source.name):
            for chunk in _unpacked(raw, source.packing):
                if mark:
                    _insist_on_text(chunk, source)
                yield chunk.removeprefix(mark)
                mark = b"" if chunk else mark
    except (zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{source.name} cannot be read: {error}") from None


def _insist_on_text(begin: bytes, source: Source) -> None:
    """Raise DataError where unpacked text begins as packed or as a table: each line of it would be a bad one."""
    found = next((form for pattern, form in _BEGINS if re.match(pattern, begin)), None)
    if source.documents == "parquet" or source.packing or found is None:
        return
    kind = source.documents if source.documents in FORMATS else "txt"
    form = found if found in FORMATS else f"{kind}.{found}"
    raise DataError(f"{source.name} is no text, but begins as {found} does; name it so, or give --format {form}")


@contextlib.contextmanager
def seekable(source: Source) -> Iterator[BinaryIO]:
    """A stream of the unpacked bytes that can be read at any place; a temporary file where the source cannot."""
    with opened(source) as raw:
        if source.path != STANDARD_INPUT and not source.packing:
            yield raw.stream
            return
        with tempfile.TemporaryFile() as copy:
            for chunk in chunks(raw, source):
                copy.write(chunk)
            copy.seek(0)
            yield copy


def _unpacked(raw: CountedStream, packing: str) -> Iterator[bytes]:
    match packing:
        case "gz":
            stream = gzip.GzipFile(fileobj=raw)
        case "bz2":
            return _unpacked_streams(raw, bz2.BZ2Decompressor)
        case "xz":
            return _unpacked_streams(raw, lzma.LZMADecompressor, padding=b"\0")
        case "zst":
            return _unpacked_zstd(raw)
        case _:
            stream = raw
    return iter(lambda: stream.read(_READ_BYTES), b"")


def _unpacked_streams(
    raw: CountedStream, begun: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes = b""
) -> Iterator[bytes]:
    # Not BZ2File and LZMAFile: they take what follows a stream and does not begin as one for the end of the file.
    stream = begun()
    padded = 0
    while data := raw.read(_READ_BYTES):
        while True:
            if stream is None:
                packed = data.lstrip(padding)
                padded += len(data) - len(packed)
                if not packed:
                    break
                _insist_on_padding(padded)
                stream, data, padded = begun(), packed, 0
            yield stream.decompress(data, _READ_BYTES)
            data = stream.unused_data
            if stream.eof:
                stream = None
            elif stream.needs_input:
                break
    if stream is not None:
        raise EOFError("the last stream has no end")
    _insist_on_padding(padded)


def _insist_on_padding(size: int) -> None:
    if size % 4:
        raise OSError(f"{size} zeros follow a stream, where xz has a multiple of 4")


def _unpacked_zstd(raw: CountedStream) -> Iterator[bytes]:
    # Not zstandard's stream reader: it takes a frame that is cut off for a finished one.
    import zstandard

    # One byte stands for up to 32 KiB and all of a slice is unpacked at once: slices are short where much comes out.
    frame, most = None, _ZSTD_LEAST
    while data := raw.read(_READ_BYTES):
        start, held, size = 0, [], 0
        while start < len(data):
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            piece = data[start : start + most]
            try:
                held.append(frame.decompress(piece))
            except zstandard.ZstdError as error:
                raise OSError(error) from None
            start += len(piece) - len(frame.unused_data)
            if frame.eof:
                frame = None
            most = _ZSTD_LEAST if len(held[-1]) > _ZSTD_LARGE else min(2 * most, _ZSTD_MOST)
            size += len(held[-1])
            if size >= _ZSTD_LARGE or start == len(data):
                yield b"".join(held)
                held, size = [], 0
    if frame is not None:
        raise EOFError("the last frame has no end")
