"""The folder a job works in: for one process at a time, for one job alone, known again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_lite.data.text_input import Source
from megatron_lite.errors import DataError

_LOCK = "lock"
_PATIENCE = 5.0
_SOURCES = "sources"


@contextlib.contextmanager
def claimed(work: Path, name: str) -> Iterator[None]:
    """The folder `work`, made and held by this process alone. `name` is what messages call it.

    Raises DataError if another process holds it, or if it or what is done in this block cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / _LOCK, "w") as lock:
            _hold(lock, name)
            yield
    except OSError as error:
        raise DataError(f"{name} cannot be written: {error.strerror or error}") from None


def _hold(lock: TextIO, name: str) -> None:
    """Lock a file. Workers of a process that was killed may hold it for a moment yet."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DataError(f"{name} is being written by another process; wait for it") from None
            time.sleep(0.1)


def clear(work: Path) -> None:
    """Throw away all that a claimed folder holds."""
    for path in work.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def job_facts(sources: Sequence[Source], **options: Any) -> dict[str, Any]:
    """What decides a job's output, as JSON has it: its sources, with size and time of files, and its options."""
    stated = []
    for source in sources:
        stated.append(dataclasses.asdict(source) | {"path": source.name})
        if os.path.isfile(source.path):
            stat = os.stat(source.path)
            stated[-1] |= {"size": stat.st_size, "modified": stat.st_mtime_ns}
    return {_SOURCES: stated, **options}


def insist_on_job(known: Mapping[str, Any] | None, wanted: Mapping[str, Any], name: str) -> None:
    """Raise DataError if a folder has work of another job, or of inputs that have changed since."""
    if known is not None and known != wanted:
        raise DataError(
            f"{name} is of another job ({_difference(known, wanted)}); give another place, or --overwrite to begin anew"
        )


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    before = {source["path"]: source for source in known.get(_SOURCES, ())}
    now = {source["path"]: source for source in wanted[_SOURCES]}
    changed = next((path for path in now if now[path] != before.get(path)), None)
    if list(before) == list(now) and changed:
        return f"{changed} has changed since"
    return ", ".join(name for name in sorted({*known, *wanted}) if known.get(name) != wanted.get(name)) + " differ"
