"""Plain log lines: rank 0 speaks for all, another rank only when the line is its own.

`note` is progress, `warn` a fallback or a doubtful value (a fallback is never silent),
`once` a line that is said one time whatever the number of callers. No line has credentials in it.
Where a rank's output goes to a file (monitor/rank_log.py), lines go there and to the console.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from megatron_lite.credentials import without_credentials

_rank = 0
_world_size = 1
_place = ""
_stream: TextIO | None = None
_console: TextIO | None = None
_record: TextIO | None = None
_said: set[str] = set()


def configure(rank: int, world_size: int, stream: TextIO | None = None) -> None:
    """State which rank this process is; `stream` defaults to standard error at each call."""
    global _rank, _world_size, _stream
    _rank, _world_size, _stream = rank, world_size, stream


def attach(console: TextIO | None = None, record: TextIO | None = None, place: str = "") -> None:
    """Write each line to `console` in place of standard error, and to `record` too; `place` is told beside the rank."""
    global _console, _record, _place
    _console, _record, _place = console, record, place


def console() -> TextIO:
    """Where a person looks: standard error, or what stands for it."""
    return _console or sys.stderr


def _write(text: str, to_console: bool = True) -> None:
    stamp = time.strftime("%H:%M:%S")
    prefix = f"[{stamp}]" if _rank == 0 else f"[{stamp} rank {_rank}/{_world_size}{_place}]"
    lines = "".join(f"{prefix} {line}\n" for line in without_credentials(text).splitlines() or [""])
    for stream in (_record, (_stream or console()) if to_console else None):
        if stream is not None:
            # With two places to write to, a full disk or a closed console is no reason to end.
            with contextlib.suppress(*() if _record is None else (OSError,)):
                stream.write(lines)
                stream.flush()


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed in this block ends quietly once nobody reads it any more (`| head`)."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # What is left in the buffer would be tried again as Python ends.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


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


def aside(text: str) -> None:
    """Put a line into this rank's record alone, where it has one: others tell it."""
    _write(text, to_console=False)


def once(text: str) -> None:
    """Warn on rank 0, the first time only."""
    if text not in _said:
        _said.add(text)
        warn(text)
