"""The documents of a block: their text under a name or a dotted path, the other fields, or what is wrong."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from megatron_lite.data.text_blocks import BLANK_LINES, Block, archived_pages
from megatron_lite.data.text_input import reading

_ARCHIVE = "warc"
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.I)
_DECLARED_WITHIN = 4096
_LIKELY = "windows-1252"
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
MISSING = object()
"""Stands for the value of a key that is not there."""


@dataclasses.dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: the line it starts on, the kind of fault, and what was found there."""

    line: int
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One document as it is read: the line, row or record it starts on, and its fields.

    `text` is that of a source without fields of its own, a plain text or a page; None elsewhere.
    """

    line: int
    fields: Mapping[str, Any]
    text: str | None = None

    def text_of(self, key: str) -> str | BadDocument:
        """The text under a key, or under a dotted path of keys."""
        if self.text is not None:
            return self.text
        value = self._value(key)
        if isinstance(value, BadDocument):
            return value
        if not isinstance(value, str):
            return BadDocument(self.line, "not a string", f"{key!r} is of type {type(value).__name__}")
        if not _is_utf8(value):
            return BadDocument(
                self.line, "invalid UTF-8", f"{key!r} has an escaped lone surrogate (\\ud800 to \\udfff)"
            )
        return value

    def number_of(self, key: str) -> float | BadDocument:
        """The number under a key or a dotted path, one that float32 can hold."""
        value = self._value(key)
        if isinstance(value, BadDocument):
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return BadDocument(self.line, "not a number", f"{key!r} is of type {type(value).__name__}")
        if abs(value) > _LARGEST_NUMBER:
            return BadDocument(self.line, "number too large", f"{key!r} is beyond the {_LARGEST_NUMBER:.3g} of float32")
        return value

    def _value(self, key: str) -> Any:
        value = value_at(self.fields, key)
        if value is MISSING:
            has = ", ".join(map(repr, list(self.fields)[:8])) or "none"
            return BadDocument(self.line, "missing key", f"no key {key!r}; the keys are {has}")
        return value


def value_at(fields: Mapping[str, Any], key: str) -> Any:
    """What stands under a key, or under a dotted path of keys; MISSING where nothing does."""
    value: Any = fields
    for name in (key,) if key in fields else key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def parse_block(
    block: Block, keys: Sequence[str], number_keys: Sequence[str] = ()
) -> Iterator[tuple[Any, ...] | BadDocument]:
    """The texts of each document of a block under each key (plain text has one), or what is wrong with it.

    Behind the texts stand the numbers under `number_keys`. Blank lines and blank paragraphs are no documents. The key
    of a source's own, where it has one, stands for "text".
    """
    own = block.source.text_key
    keys = [own if own and key == "text" else key for key in keys]
    for record in parse_records(block):
        if isinstance(record, BadDocument):
            yield record
            continue
        values = (*map(record.text_of, keys), *map(record.number_of, number_keys))
        bad = next((value for value in values if isinstance(value, BadDocument)), None)
        yield values if bad is None else bad


def texts_of(blocks: Iterable[Block], keys: Sequence[str]) -> list[str]:
    """All texts in blocks under these keys, without documents that cannot be used."""
    documents = itertools.chain.from_iterable(parse_block(block, keys) for block in blocks)
    return [text for document in documents if not isinstance(document, BadDocument) for text in document]


def parse_records(block: Block) -> Iterator[Record | BadDocument]:
    """Each document of a block, or what is wrong with it."""
    if block.too_long:
        yield BadDocument(block.first_line, "too long", f"it has {block.too_long:,} bytes or more")
        return
    documents = block.source.documents
    if documents == _ARCHIVE:
        yield from _archived(block)
    elif documents == "html":
        if block.data:
            yield Record(1, {}, decoded_page(block.data))
    elif documents in ("file", "line", "paragraph"):
        for number, piece in _plain_pieces(block):
            try:
                yield Record(number, {}, piece.decode())
            except UnicodeDecodeError as error:
                line = number + piece.count(b"\n", 0, error.start)
                yield BadDocument(line, "invalid UTF-8", f"byte 0x{piece[error.start]:02x}: {error.reason}")
    else:
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            if line.strip():
                yield _parse_line(line, number)


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
    ends = [(match.start(), match.end()) for match in BLANK_LINES.finditer(block.data)]
    for end, following in [*ends, (len(block.data), len(block.data))]:
        piece = block.data[start:end].strip(b"\r\n")
        if piece.strip():
            yield line, piece
        line += block.data.count(b"\n", start, following)
        start = following


def _parse_line(line: bytes, number: int) -> Record | BadDocument:
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
        return BadDocument(number, "not an object", f"{_excerpt(line)} is no {{...}} with keys")
    return Record(number, document)


def _archived(block: Block) -> Iterator[Record | BadDocument]:
    """The pages among the records of a web archive: responses of a server that are HTML or plain text."""
    with reading(block.source.name):
        from fastwarc.warc import ArchiveIterator

    for number, start, end in archived_pages(block):
        # An iterator for each record: behind a body that is not what its headers say it is, one goes no further.
        records = ArchiveIterator(io.BytesIO(block.data[start:end]), parse_http=True, auto_decode="all")
        try:
            page = _page(number, next(records, None))
        except (OSError, ValueError) as error:
            page = BadDocument(number, "damaged body", f"its headers say otherwise: {_excerpt(str(error).encode())}")
        if page is not None:
            yield page


def _page(number: int, record: Any) -> Record | None:
    if record is None:
        return None
    kind = (record.http_content_type or "text/plain").lower()
    if "html" not in kind and kind != "text/plain":
        return None
    fields = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date")}
    return Record(number, fields, decoded_page(record.reader.read(), record.http_charset))


def decoded_page(data: bytes, charset: str | None = None) -> str:
    """The text of a page: by the charset that its server or the page itself names, else UTF-8 or Windows-1252."""
    declared = _DECLARED.search(data[:_DECLARED_WITHIN])
    for name in (charset, "utf-8", declared[1].decode() if declared else None):
        try:
            text = data.decode(name or "utf-8")
        except (ValueError, LookupError):
            continue
        if _is_utf8(text):
            return text
    return data.decode(_LIKELY, errors="replace")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(line: bytes) -> str:
    text = line.strip().decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
