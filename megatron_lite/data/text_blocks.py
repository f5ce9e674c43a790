"""Sources as a stream of blocks that end where documents end, and a limit on how much of it is read."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_lite.data.text_input import Documents, Source, reading
from megatron_lite.data.text_streams import CountedStream, chunks, opened, seekable
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.kernels.crc32 import crc32

BLOCK_BYTES = 1 << 20
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_FILLED_LINE = re.compile(rb"^[^\S\n]*\S[^\n]*(?:\n|\Z)", re.M)
_WHOLE_FILES = ("file", "html")
_ROWS_AT_ONCE = 256
_WARC_LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d+)[ \t]*\r?$", re.M | re.I)
_WARC_RESPONSE = re.compile(rb"^WARC-Type:[ \t]*(?:response|conversion)[ \t]*\r?$", re.M | re.I)
_WARC_HEAD_BYTES = 1 << 20
_MOST_COUNTED = 1 << 62


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole documents of a source; `first_line` counts from 1, `read` is the bytes on disk they took.

    Rows of tables are JSON lines here. `too_long` is the size at which a document was given up: the block stands for
    it and is otherwise empty. `place` is where `data` begins in its file, where it lies there as it is.
    """

    source: Source
    first_line: int
    data: bytes
    read: int
    too_long: int = 0
    place: int | None = None


@dataclasses.dataclass(frozen=True)
class BlockInFile:
    """A block without its data, for another process: to read it there once more takes less than to send it."""

    source: Source
    first_line: int
    read: int
    place: int
    size: int
    crc32: int

    def block(self) -> Block:
        """The block. Raises DataError if its file cannot be read or has changed since."""
        with reading(self.source.name), open(self.source.path, "rb") as file:
            file.seek(self.place)
            data = file.read(self.size)
        if crc32(data) != self.crc32:
            raise DataError(
                f"{self.source.place(self.first_line)}: the file was changed while it was read; --overwrite begins anew"
            )
        return Block(self.source, self.first_line, data, self.read, place=self.place)


def to_send(block: Block) -> Block | BlockInFile:
    """What another process is sent for a block."""
    if block.place is None:
        return block
    return BlockInFile(block.source, block.first_line, block.read, block.place, len(block.data), crc32(block.data))


def read_blocks(
    source: Source, block_bytes: int = BLOCK_BYTES, fields: Sequence[str] | None = None, longest: int | None = None
) -> Iterator[Block]:
    """A source in blocks of about `block_bytes` of text, unpacked, without a byte-order mark.

    Of tables, only the columns of `fields` (dotted paths, all by None) are read. Memory is that of a block or of the
    longest document, whichever is more; a document beyond `longest` bytes is skipped and told. Raises DataError for a
    source that cannot be read, or is damaged or ends early inside its packing.
    """
    if source.documents == "parquet":
        yield from _row_blocks(source, _parquet_rows(source, fields), block_bytes)
    elif source.documents == "dataset":
        yield from _row_blocks(source, _data_set_rows(source), block_bytes)
    else:
        cut = _cut_archive if source.documents == "warc" else _cut_text
        with opened(source) as raw:
            yield from cut(raw, source, block_bytes, longest or sys.maxsize)


def _cut_text(raw: CountedStream, source: Source, block_bytes: int, longest: int) -> Iterator[Block]:
    """Where it is cut follows from the text alone, not from the amounts it comes in."""
    pending: list[bytes] = []
    usual = min(block_bytes, longest)
    size, wanted, line, told = 0, usual, 1, 0
    skipping, skipped, passed = False, 0, 0
    lies_there = source.is_file and not source.packing
    for chunk in chunks(raw, source):
        pending.append(chunk)
        size += len(chunk)
        while skipping or size >= wanted:
            data = b"".join(pending)
            if skipping:
                end = _first_bound(data, source.documents)
                # Of what may begin a blank line, its first byte is enough.
                begun = not end and source.documents == "paragraph" and data.rstrip(b" \t\r").endswith(b"\n")
                skipped += (end or size) - begun
                passed += data.count(b"\n", 0, end or size) - begun
                if not end:
                    pending, size = [b"\n"] if begun else [], int(begun)
                    break
                yield Block(source, line, b"", raw.position - told, too_long=skipped)
                line, told, wanted = line + passed, raw.position, usual
                skipping, skipped, passed = False, 0, 0
            elif end := _last_bound(data, wanted, source.documents):
                place = raw.position - size if lies_there else None
                yield Block(source, line, data[:end], raw.position - told, place=place)
                line, told, wanted = line + data.count(b"\n", 0, end), raw.position, usual
            elif wanted < longest:
                # Twice the size each time: a very long document costs linear time.
                wanted = min(2 * wanted, longest)
            else:
                skipping, end = True, 0
            pending, size = [data[end:]], size - end
            if not size:
                break
    yield Block(source, line, b"" if skipping else b"".join(pending), raw.position - told, too_long=skipped)


def _first_bound(data: bytes, documents: Documents) -> int:
    """Where a document that begins before `data` ends; 0 if it does not there."""
    if documents in _WHOLE_FILES:
        return 0
    if documents == "paragraph":
        found = _BLANK_LINE.search(data)
        return found.end() if found else 0
    return data.find(b"\n") + 1


def _last_bound(data: bytes, end: int, documents: Documents) -> int:
    """Where the last document before `end` that is surely complete ends; 0 if none is."""
    if documents in _WHOLE_FILES:
        return 0
    if documents == "paragraph":
        return max((match.end() for match in _BLANK_LINE.finditer(data, 0, end)), default=0)
    return data.rfind(b"\n", 0, end) + 1


class _Pieces:
    """Bytes taken off a stream in the amounts asked for."""

    def __init__(self, stream: Iterator[bytes]):
        self._stream = stream
        self._data = b""

    def until(self, mark: bytes, most: int) -> bytes:
        """What comes up to and with `mark`; what there is where it does not come within `most` bytes."""
        while (found := self._data.find(mark)) < 0 and len(self._data) < most and self._more():
            pass
        return self.take(found + len(mark) if found >= 0 else most)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        held, length = [self._data], len(self._data)
        while length < size and (chunk := next(self._stream, b"")):
            held.append(chunk)
            length += len(chunk)
        data = b"".join(held)
        self._data = data[size:]
        return data[:size]

    def skip(self, size: int) -> None:
        """Leave out the next `size` bytes without holding them."""
        while size > len(self._data):
            size -= len(self._data)
            self._data = b""
            if not self._more():
                return
        self._data = self._data[size:]

    def _more(self) -> bool:
        chunk = next(self._stream, b"")
        self._data += chunk
        return bool(chunk)


def _cut_archive(raw: CountedStream, source: Source, block_bytes: int, longest: int) -> Iterator[Block]:
    """Whole WARC records: a head, a blank line, as many bytes as the head says, two line ends."""
    pieces = _Pieces(filter(None, chunks(raw, source)))
    records: list[bytes] = []
    size, first, told = 0, 1, 0

    def block(too_long: int = 0) -> Block:
        nonlocal records, size, first, told
        done = Block(source, first, b"".join(records), raw.position - told, too_long)
        first += len(records) or 1
        records, size, told = [], 0, raw.position
        return done

    while head := pieces.until(b"\r\n\r\n", _WARC_HEAD_BYTES):
        number = first + len(records)
        length = _WARC_LENGTH.search(head)
        if not head.lstrip(b"\r\n").startswith(b"WARC/") or length is None or not head.endswith(b"\r\n\r\n"):
            raise DataError(f"{source.place(number)} does not begin as a record of a web archive does")
        body = int(length[1]) + len(b"\r\n\r\n")
        if body > longest:
            if records:
                yield block()
            pieces.skip(body)
            yield block(too_long=body)
            continue
        record = head + pieces.take(body)
        if len(record) < len(head) + int(length[1]):
            raise DataError(f"{source.place(number)} ends early; the archive is truncated, copy it again")
        records.append(record)
        size += len(record)
        if size >= block_bytes:
            yield block()
    if records:
        yield block()


def _row_blocks(
    source: Source, rows: Iterable[Mapping[str, Any] | orjson.Fragment], block_bytes: int
) -> Iterator[Block]:
    lines: list[bytes] = []
    size, first = 0, 1
    for row in rows:
        lines.append(orjson.dumps(row, default=_as_json, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE))
        size += len(lines[-1])
        if size >= block_bytes:
            yield Block(source, first, b"".join(lines), 0)
            first, size, lines = first + len(lines), 0, []
    yield Block(source, first, b"".join(lines), source.size or 0)


def _as_json(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _parquet_rows(source: Source, fields: Sequence[str] | None) -> Iterator[Mapping[str, Any] | orjson.Fragment]:
    """The rows of a table; for one with bytes that are no UTF-8, those bytes, a line that is as bad."""
    with reading(source.name):
        import pyarrow
        import pyarrow.parquet

    with seekable(source) as stream, reading(source.name):
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            columns = None
            if fields is not None:
                wanted = {*fields, *(field.partition(".")[0] for field in fields)}
                columns = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                try:
                    yield from batch.to_pylist()
                except UnicodeDecodeError:
                    yield from map(_row, (batch.slice(place, 1) for place in range(batch.num_rows)))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{source.name} cannot be read: {error}") from None


def _row(table: Any) -> Mapping[str, Any] | orjson.Fragment:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return orjson.Fragment(error.object.replace(b"\n", b" "))


def _data_set_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """The rows of hf:NAME:CONFIG:SPLIT, streamed, or of hf:FOLDER; config and split may be left out."""
    spec = source.path.removeprefix("hf:")
    name, config, split = [*spec.split(":"), "", ""][:3]
    with reading(source.name):
        import datasets

        folder = Path(name)
        try:
            if any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
                stored = datasets.load_from_disk(name)
                rows = stored[split or "train"] if isinstance(stored, dict) else stored
            else:
                rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except (ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{source.name} cannot be opened: {error}") from None
        try:
            yield from rows
        except (OSError, EOFError, ImportError):
            raise
        except Exception as error:
            # Damage comes as errors of the library, of those it reads with, and of Python.
            raise DataError(f"{source.name} cannot be read: {type(error).__name__}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Limit:
    """How much is read at most, of all sources together: documents, or bytes of unpacked input."""

    documents: int | None = None
    bytes: int | None = None


NO_LIMIT = Limit()


def parse_limit(text: str | None, flag: str = "--limit") -> Limit:
    """A --limit, or another `flag`: 10000 is documents, 500MB or 2GiB bytes, None no limit. Raises ConfigError."""
    if text is None:
        return NO_LIMIT
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)(B?)", text)
    if not match or (match[4] and match[3] and not match[2]) or (not match[4] and (match[2] or match[3])):
        raise ConfigError(f"{flag} {text} is not known; give a number of documents (10000) or bytes (500MB, 2GiB).")
    number = float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2].replace("K", "k") or " ")
    if number > _MOST_COUNTED:
        raise ConfigError(f"{flag} {text:.40} is more than can be counted; leave it out to read all.")
    if number < 1 or number % 1:
        raise ConfigError(f"{flag} {text} is {number:g}; give a whole number of at least 1.")
    return Limit(bytes=int(number)) if match[4] else Limit(documents=int(number))


def limited(blocks: Iterable[Block], limit: Limit) -> Iterator[Block]:
    """The blocks up to a limit: that many documents, or as many whole ones as begin within that many bytes."""
    left = limit.documents if limit.documents is not None else limit.bytes
    for block in blocks:
        if left is None:
            yield block
            continue
        if limit.documents is None:
            data = block.data
            end = next((end for end in _ends(block) if end >= left), len(data)) if len(data) > left else len(data)
            left -= len(data[:end])
        else:
            ends = list(itertools.islice(_ends(block), left))
            left -= len(ends) + (block.too_long > 0)
            end = ends[-1] if ends and not left else len(block.data)
        yield dataclasses.replace(block, data=block.data[:end])
        if left <= 0:
            return


def _ends(block: Block) -> Iterator[int]:
    """Where each document of a block ends."""
    match block.source.documents:
        case "file" | "html":
            if block.data:
                yield len(block.data)
        case "paragraph":
            start = 0
            for match in itertools.chain(BLANK_LINES.finditer(block.data), [None]):
                end = match.end() if match else len(block.data)
                if block.data[start:end].strip():
                    yield end
                start = end
        case "warc":
            yield from (end for _, _, end in archived_pages(block))
        case _:
            yield from (match.end() for match in _FILLED_LINE.finditer(block.data))


def archived_pages(block: Block) -> Iterator[tuple[int, int, int]]:
    """The number of each record of a block of an archive that holds a page, where it begins and where it ends."""
    number, start = block.first_line, 0
    while start < len(block.data):
        body = block.data.index(b"\r\n\r\n", start) + 4
        head = block.data[start:body]
        end = min(body + int(_WARC_LENGTH.search(head)[1]) + 4, len(block.data))
        if _WARC_RESPONSE.search(head):
            yield number, start, end
        number, start = number + 1, end
