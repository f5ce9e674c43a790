"""Lines of JSON in packed pieces: pieces put end to end are a packed file."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from typing import Any, Literal

import orjson
import zstandard

OutputFormat = Literal["jsonl", "jsonl.gz", "jsonl.zst"]
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


def json_line(value: Any) -> bytes:
    """A value as a line of JSON. Raises TypeError for what JSON cannot say."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def packed(lines: Iterable[bytes], form: OutputFormat) -> bytes:
    """Lines as one piece of a file of a format; the same bytes for the same lines."""
    data = b"".join(lines)
    if form == "jsonl" or not data:
        return data
    if form == "jsonl.gz":
        return gzip.compress(data, _GZIP_LEVEL, mtime=0)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def unpacked_values(piece: bytes) -> list[Any]:
    """The values of a piece of jsonl.zst."""
    data = zstandard.ZstdDecompressor().decompress(piece) if piece else b""
    return [orjson.loads(line) for line in data.splitlines()]
