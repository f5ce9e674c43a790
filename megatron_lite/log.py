"""Plain log lines: rank 0 speaks for all, another rank only when the line is its own.

`note` is progress, `warn` a fallback or a doubtful value (a fallback is never silent),
`once` a line that is said one time whatever the number of callers.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

_rank = 0
_world_size = 1
_stream: TextIO | None = None
_said: set[str] = set()


def configure(rank: int, world_size: int, stream: TextIO | None = None) -> None:
    """State which rank this process is; `stream` defaults to standard error at each call."""
    global _rank, _world_size, _stream
    _rank, _world_size, _stream = rank, world_size, stream


def _write(text: str) -> None:
    stream = _stream or sys.stderr
    stamp = time.strftime("%H:%M:%S")
    prefix = f"[{stamp}]" if _rank == 0 else f"[{stamp} rank {_rank}/{_world_size}]"
    stream.write("".join(f"{prefix} {line}\n" for line in text.splitlines() or [""]))
    stream.flush()


def note(text: str) -> None:
    """Say a line on rank 0."""
    if _rank == 0:
        _write(text)


def warn(text: str) -> None:
    """Say a line that begins with "warning:" on rank 0."""
    if _rank == 0:
        _write(f"warning: {text}")


def every_rank(text: str) -> None:
    """Say a line on whichever rank calls, with its number."""
    _write(text)


def once(text: str) -> None:
    """Warn on rank 0, the first time only."""
    if text not in _said:
        _said.add(text)
        warn(text)
