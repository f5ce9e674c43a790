"""A uniform sample of a stream of texts within bounded memory."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator


class TextSample:
    """The texts with the smallest of random keys that fit into `most_bytes` of UTF-8, in the order they came in.

    They are the longest run of the texts in the order of their keys that fits, so that each text is as likely to be in
    it as any other of its size (bottom-k sampling). The same texts give the same sample, and all of them are in it
    where they fit.
    """

    def __init__(self, most_bytes: int, seed: int = 0):
        self._most_bytes = most_bytes
        self._draw = random.Random(seed)
        self._kept: list[tuple[float, int, int, str]] = []  # a heap, the largest key first
        self._bound = 1.0
        self._seen = 0
        self.bytes = self.seen_bytes = 0

    def add(self, text: str) -> None:
        """Offer the next text."""
        size = len(text.encode())
        key = self._draw.random()
        self._seen += 1
        self.seen_bytes += size
        # There may be room behind a large text that went: what has a larger key went for it, or would have.
        if key >= self._bound:
            return
        heapq.heappush(self._kept, (-key, self._seen, size, text))
        self.bytes += size
        while self.bytes > self._most_bytes:
            negative, _, size, _ = heapq.heappop(self._kept)
            self._bound = -negative
            self.bytes -= size

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[str]:
        for _, _, _, text in sorted(self._kept, key=lambda kept: kept[1]):
            yield text
