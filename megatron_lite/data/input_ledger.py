"""What was read of each source: its bytes and their hash, taken while they pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_lite.data.text_blocks import Block
from megatron_lite.data.text_input import Source


class InputLedger:
    """The sources of a job as they are read.

    Counted and hashed is what was taken of each, unpacked (rows of tables as JSON lines), up to a --limit. Of a plain
    file that is read whole it is the hash that sha256sum prints.
    """

    def __init__(self) -> None:
        self._taken: dict[str, _Taken] = {}

    def watch(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks, entered as they pass."""
        for block in blocks:
            taken = self._taken.setdefault(block.source.path, _Taken(block.source))
            taken.hash.update(block.data)
            taken.read += len(block.data)
            yield block

    def entries(self) -> list[dict[str, Any]]:
        """For each source that was begun: its name, its size on disk where that is known, bytes read and SHA-256."""
        return [
            {
                "name": taken.source.name,
                "size": taken.source.size,
                "read": taken.read,
                "sha256": taken.hash.hexdigest(),
            }
            for taken in self._taken.values()
        ]


class _Taken:
    def __init__(self, source: Source):
        self.source, self.hash, self.read = source, hashlib.sha256(), 0
