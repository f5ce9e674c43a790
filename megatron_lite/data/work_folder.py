"""The folder a job works in: for one process at a time, for one job alone, known again after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from megatron_lite.data.text_input import Source
from megatron_lite.errors import DataError
from megatron_lite.publish import publish

Content = TypeVar("Content", bound="dict | list")

_LOCK = "lock"
_JOB = "job.json"
_WORTH_KEEPING = ("*/*.unit", "*/crashes.json")
_PATIENCE = 5.0
_SOURCES = "sources"


@contextlib.contextmanager
def claimed(work: Path, name: str) -> Iterator[None]:
    """The folder `work`, made and held by this process alone. `name` is what messages call it.

    It is gone when the block ends without a finished unit in it. Raises DataError if another process holds it, if it
    is a folder of something else, or if it or what is done in this block cannot be written.
    """
    try:
        with _held(work, name):
            try:
                yield
            finally:
                if not _has_work(work):
                    clear(work)
                    # Last: without it, a folder that holds anything is not ours.
                    (work / _LOCK).unlink()
                    with contextlib.suppress(OSError):  # another process may have claimed it since
                        work.rmdir()
    except OSError as error:
        raise DataError(f"{name} cannot be written: {error.strerror or error}") from None


def _held(work: Path, name: str) -> TextIO:
    """The locked file of a folder. Workers of a process that was killed may hold it for a moment yet."""
    deadline = time.monotonic() + _PATIENCE
    path = work / _LOCK
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            if any(work.iterdir()) and not path.exists():
                raise DataError(f"{work} holds files that no run has left there; move it away, or give another place")
            lock = open(path, "w")  # noqa: SIM115
        except FileNotFoundError:  # its holder has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DataError(f"{name} is being written by another process; wait for it") from None
            time.sleep(0.1)
        lock.close()


def _has_work(work: Path) -> bool:
    return any(path for pattern in _WORTH_KEEPING for path in work.glob(pattern))


def clear(work: Path) -> None:
    """Throw away all that a claimed folder holds, first of all the name of the job, without which nothing is kept."""
    (work / _JOB).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(
    work: Path, job: Mapping[str, Any], name: str, overwrite: bool, keep: bool = True, stated_now: bool = True
) -> bool:
    """Make a claimed folder that of a job; whether it holds work of it that goes on.

    It does not after a run that was killed before its first unit was done or while it cleared the folder, nor without
    `keep`. A folder that is begun is not `stated_now` if units are not worth keeping before `state` says so. Raises
    DataError if it has units of another job, unless those are to be overwritten.
    """
    stated = work / _JOB
    goes_on = False
    if not overwrite and stated.exists() and _has_work(work):
        insist_on_job(read_note(stated, dict), job, name)
        goes_on = keep
    if not goes_on:
        clear(work)
        if stated_now:
            state(work, job)
    return goes_on


def state(work: Path, job: Mapping[str, Any]) -> None:
    """Name the job that a claimed folder is of: from now on its units are kept."""
    publish(work / _JOB, json.dumps(job))


def read_note(path: Path, kind: type[Content]) -> Content:
    """The JSON a job has noted in its folder. Raises DataError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if type(content) is not kind:
            raise ValueError(f"it is a {type(content).__name__} and no {kind.__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); --overwrite begins anew") from None


def digest_of(job: Mapping[str, Any]) -> str:
    """What tells a job from others: the SHA-256 of its facts."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def job_facts(sources: Sequence[Source], **options: Any) -> dict[str, Any]:
    """What decides a job's output, as JSON has it: its sources, with size and time of files, and its options."""
    stated = []
    for source in sources:
        stated.append(dataclasses.asdict(source) | {"path": source.name})
        if source.is_file:
            stat = os.stat(source.path)
            stated[-1] |= {"size": stat.st_size, "modified": stat.st_mtime_ns}
    return {_SOURCES: stated, **options}


def insist_on_job(known: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Raise DataError if a folder has work of another job, or of inputs that have changed since."""
    if known != wanted:
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
