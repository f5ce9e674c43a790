"""How far the reading of text has come: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from megatron_lite import log
from megatron_lite.data.text_input import Source


class TextProgress:
    """Documents, megabytes and rates while sources are read.

    On a terminal the bar counts bytes on disk against the size of all sources, where that is known; in
    a log a line is written every `interval` documents.
    """

    def __init__(self, sources: Sequence[Source], interval: int):
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(sizes)
        self.documents = self.tokens = self.text_bytes = 0
        self._interval = interval
        self._next = interval
        self._start = time.monotonic()
        self._bar = _bar(total) if sys.stderr is not None and sys.stderr.isatty() else None

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def add(self, read: int, documents: int, text_bytes: int, tokens: int = 0) -> None:
        """Count what was just done; `read` is bytes on disk."""
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        if self._bar is not None:
            rate = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.tokens else ""
            self._bar.set_postfix_str(f"{self.documents:,} documents{rate}", refresh=False)
            self._bar.update(read)
        elif self.documents >= self._next:
            self._next = (self.documents // self._interval + 1) * self._interval
            log.note(self.summary())

    def summary(self) -> str:
        """All counts and rates so far, as a line."""
        megabytes = self.text_bytes / 1e6
        parts = [f"{self.documents:,} documents", f"{megabytes:,.1f} MB, {megabytes / self.seconds:,.1f} MB/s"]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.tokens / self.seconds:,.0f} tokens/s")
        return "; ".join(parts)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _bar(total: int | None) -> Any:
    """A bar of bytes, without the thread that tqdm watches its bars from: see `map_in_order`."""
    import tqdm  # takes a while, and logs do without

    class Bar(tqdm.tqdm):
        monitor_interval = 0

    return Bar(total=total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False)
