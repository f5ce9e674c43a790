"""Megatron's .bin and .idx as a script writes them that was made for one corpus: all lengths in memory."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

DOCUMENTS_AT_ONCE = 1000


def documents(path: str) -> Iterator[list[str]]:
    """The texts of JSON lines, a thousand at a time."""
    with open(path, "rb") as lines:
        while texts := [json.loads(line)["text"] for line in islice(lines, DOCUMENTS_AT_ONCE)]:
            yield texts


def write(prefix: str, rows: Iterable[list[int]], end: int) -> None:
    """Write documents of ids below 65,536, each with its end behind it."""
    lengths = []
    with open(f"{prefix}.bin", "wb") as tokens:
        for row in rows:
            tokens.write(np.array([*row, end], np.uint16).tobytes())
            lengths.append(len(row) + 1)
    sizes = np.array(lengths, np.int32)
    pointers = np.cumsum(sizes, dtype=np.int64) * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1))
        index.write(sizes.tobytes())
        index.write((pointers - 2 * sizes.astype(np.int64)).tobytes())
        index.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


def main(make: Callable[[str, str, int], tuple[Callable[[list[str]], Iterable[list[int]]], int]]) -> None:
    """Run a script: INPUT.jsonl PREFIX VOCABULARY MERGES THREADS. `make` gives what encodes a batch, and the end."""
    source, prefix, vocabulary, merges, threads = sys.argv[1:]
    encode, end = make(vocabulary, merges, int(threads))
    write(prefix, (row for texts in documents(source) for row in encode(texts)), end)
