"""Text files as a stream of blocks that end where documents end, and the documents of a block."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import glob
import gzip
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import orjson

from megatron_lite import log
from megatron_lite.errors import DataError

STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 20
_READ_BYTES = 1 << 17
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PLAIN_TEXT = (".txt", ".text", ".md")
_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")

InputFormat = Literal["auto", "jsonl", "txt"]
TxtDocuments = Literal["file", "line", "paragraph"]
Documents = Literal["jsonl", "file", "line", "paragraph"]
"""What one document is: a JSON object on a line, or a whole plain text, a line or a paragraph of it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: its path, "-" for standard input, and what a document of it is."""

    path: str
    documents: Documents

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.path == STANDARD_INPUT else self.path

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for standard input and pipes."""
        return os.stat(self.path).st_size if os.path.isfile(self.path) else None


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole documents of a source; `first_line` counts from 1, `read` is the bytes on disk they took."""

    source: Source
    first_line: int
    data: bytes
    read: int


@dataclasses.dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: the line it starts on, the kind of fault, and what was found there."""

    line: int
    reason: str
    detail: str


def find_sources(
    patterns: Sequence[str], input_format: InputFormat = "auto", txt_documents: TxtDocuments = "file"
) -> list[Source]:
    """The inputs that paths and globs name, in the order given and by name within a glob.

    By "auto", .txt, .text and .md (also compressed) are plain text and anything else is JSON lines.
    Raises DataError for a pattern without a file, and for a folder.
    """
    found: list[str] = []
    for pattern in patterns:
        named = pattern == STANDARD_INPUT or os.path.exists(pattern)
        paths = [pattern] if named else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"--input {pattern}: no such file, and no file matches it as a pattern")
        for path in paths:
            if os.path.isdir(path):
                if named:
                    raise DataError(f"--input {path} is a folder; name its files, as in --input '{path}/**/*.jsonl'")
            else:
                found.append(path)
    if not found:
        raise DataError(f"--input {' '.join(patterns)} matches folders alone; name files, as in 'FOLDER/**/*.jsonl'")
    paths = list(dict.fromkeys(found))
    if len(paths) < len(found):
        log.warn(f"{len(found) - len(paths)} inputs are named more than once and read once")
    return [Source(path, _documents_of(path, input_format, txt_documents)) for path in paths]


def _documents_of(path: str, input_format: InputFormat, txt_documents: TxtDocuments) -> Documents:
    if input_format == "auto":
        name = Path(path)
        if name.suffix in _COMPRESSED:
            name = name.with_suffix("")
        input_format = "txt" if name.suffix.lower() in _PLAIN_TEXT else "jsonl"
    return "jsonl" if input_format == "jsonl" else txt_documents


def read_blocks(source: Source, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """A source in blocks of about `block_bytes` of text, unpacked, without a byte-order mark.

    Memory is that of a block or of the longest document, whichever is more. Raises DataError for a
    file that cannot be read, or is damaged or ends early inside its compression.
    """
    with _opened(source.path) as raw:
        pending: list[bytes] = []
        size, wanted, line, told = 0, block_bytes, 1, 0
        for chunk in _chunks(raw, source.name):
            pending.append(chunk)
            size += len(chunk)
            if size < wanted:
                continue
            data = b"".join(pending)
            end = _last_bound(data, source.documents)
            pending, size = [data[end:]], len(data) - end
            # Without a bound the next look is at twice the size: a very long document costs linear time.
            wanted = block_bytes if end else 2 * size
            if end:
                yield Block(source, line, data[:end], raw.position - told)
                line, told = line + data.count(b"\n", 0, end), raw.position
        yield Block(source, line, b"".join(pending), raw.position - told)


def _last_bound(data: bytes, documents: Documents) -> int:
    """Where the last document that is surely complete ends; 0 if none is."""
    if documents == "file":
        return 0
    if documents == "paragraph":
        return max((match.end() for match in _BLANK_LINE.finditer(data)), default=0)
    return data.rfind(b"\n") + 1


class _Counted:
    """A stream that knows how much was read from it: pipes have no position."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.position += len(data)
        return data


@contextlib.contextmanager
def _opened(path: str) -> Iterator[_Counted]:
    try:
        # Unbuffered: a buffered read waits for all it was asked for, and a signal that comes between two
        # of its system calls is not looked at before the pipe has more.
        stream = sys.stdin.buffer.raw if path == STANDARD_INPUT else open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        yield _Counted(stream)
    finally:
        if path != STANDARD_INPUT:
            stream.close()


def _chunks(raw: _Counted, path: str) -> Iterator[bytes]:
    """The unpacked text of a file without its byte-order mark; damage is reported with the file's name."""
    mark = _BOM
    try:
        for chunk in _unpacked(raw, Path(path).suffix):
            yield chunk.removeprefix(mark)
            mark = b"" if chunk else mark
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs the package {error.name}: pip install {error.name}") from None
    except EOFError as error:
        raise DataError(f"{path} ends early ({error}); it is truncated, copy it again") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _unpacked(raw: _Counted, suffix: str) -> Iterator[bytes]:
    match suffix:
        case ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        case ".bz2":
            stream = bz2.BZ2File(raw)
        case ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115
        case ".zst":
            return _unpacked_zstd(raw)
        case _:
            stream = raw
    return iter(lambda: stream.read(_READ_BYTES), b"")


def _unpacked_zstd(raw: _Counted) -> Iterator[bytes]:
    # Not zstandard's stream reader: it takes a frame that is cut off for a finished one.
    import zstandard

    frame = None
    while data := raw.read(_READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(error) from None
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")


def parse_block(block: Block, keys: Sequence[str]) -> Iterator[tuple[str, ...] | BadDocument]:
    """The texts of each document of a block under each key (plain text has one), or what is wrong with it.

    Blank lines and blank paragraphs are no documents.
    """
    if block.source.documents == "jsonl":
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if line.strip():
                yield _parse_line(line, number, keys)
        return
    for number, piece in _plain_pieces(block):
        try:
            yield (piece.decode(),)
        except UnicodeDecodeError as error:
            line = number + piece.count(b"\n", 0, error.start)
            yield BadDocument(line, "invalid UTF-8", f"byte 0x{piece[error.start]:02x}: {error.reason}")


def _plain_pieces(block: Block) -> Iterator[tuple[int, bytes]]:
    if block.source.documents == "file":
        if block.data:
            yield block.first_line, block.data
        return
    if block.source.documents == "line":
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if line.strip():
                yield number, line.removesuffix(b"\r")
        return
    line, start = block.first_line, 0
    ends = [(match.start(), match.end()) for match in _BLANK_LINES.finditer(block.data)]
    for end, following in [*ends, (len(block.data), len(block.data))]:
        piece = block.data[start:end].strip(b"\r\n")
        if piece.strip():
            yield line, piece
        line += block.data.count(b"\n", start, following)
        start = following


def _parse_line(line: bytes, number: int, keys: Sequence[str]) -> tuple[str, ...] | BadDocument:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Python's own reader also takes what is not strictly JSON but common: NaN, Infinity.
            document = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return BadDocument(number, "invalid UTF-8", f"byte 0x{line[error.start]:02x}: {error.reason}")
        except (ValueError, RecursionError) as error:
            return BadDocument(number, "invalid JSON", f"{error}, in {_excerpt(line)}")
    if not isinstance(document, dict):
        return BadDocument(number, "not an object", f"{_excerpt(line)} is no {{...}} with a key {keys[0]!r}")
    for key in keys:
        if key not in document:
            has = ", ".join(map(repr, list(document)[:8])) or "none"
            return BadDocument(number, "missing key", f"no key {key!r}; the keys are {has}")
        if not isinstance(document[key], str):
            return BadDocument(number, "not a string", f"{key!r} is of type {type(document[key]).__name__}")
        if not _is_utf8(document[key]):
            return BadDocument(number, "invalid UTF-8", f"{key!r} has an escaped lone surrogate (\\ud800 to \\udfff)")
    return tuple(document[key] for key in keys)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(line: bytes) -> str:
    text = line.strip().decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
