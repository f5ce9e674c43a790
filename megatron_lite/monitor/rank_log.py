"""`logs/rank-00003.log` in the run folder: all that a rank writes, native code's and Python's own among it.

The console shows what rank 0 writes, and what another rank says by name. Files grow over the restarts of a run, each
begun by a line that says when, where and how; one beyond `ROTATE_BYTES` is set aside first as `.1`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_lite import log

FOLDER = "logs"
ROTATE_BYTES = 64 << 20
_HEADER = "====="
TEE = ("tee", "--append", "--ignore-interrupts", "--output-error=warn-nopipe")
"""Copies the output of rank 0: a process of its own, so that the last words of one that crashes are not lost."""


def path_of(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank-{rank:05}.log"


def last_lines(run_dir: Path, rank: int, number: int) -> list[str]:
    """The end of what a rank wrote in its last run; empty where there is nothing, or nobody can read it."""
    try:
        with path_of(run_dir, rank).open("rb") as record:
            record.seek(max(0, record.seek(0, os.SEEK_END) - 200 * number))
            lines = record.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    begun = max((at for at, line in enumerate(lines) if line.startswith(_HEADER)), default=-1)
    return lines[begun + 1 :][-number:]


@contextlib.contextmanager
def kept(run_dir: Path | None, rank: int, world_size: int, command: str, *, several_nodes: bool) -> Iterator[None]:
    """Within it, standard output and error of this process go to its file; those of rank 0 to the console as well.

    A file that cannot be written is said, and costs nothing else. None keeps nothing.
    """
    if run_dir is None:
        yield
        return
    host = socket.gethostname()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    header = f"{_HEADER} {stamp}, rank {rank} of {world_size} on {host}, process {os.getpid()}: {command}"
    try:
        record = _open(path_of(run_dir, rank), header)
    except OSError as error:
        log.every_rank(f"warning: {path_of(run_dir, rank)} cannot be written ({error}): see the console instead")
        yield
        return
    with contextlib.ExitStack() as undo:
        undo.callback(record.close)
        console = undo.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
        log.attach(console, record, f" on {host}" if several_nodes else "")
        undo.callback(log.attach)
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            _flush(stream)
            undo.enter_context(_copied(number, record.name) if rank == 0 else _diverted(number, record.fileno()))
        if world_size > 1:
            log.note(f"each rank's whole output: {path_of(run_dir, rank).parent}")
        yield


def _open(path: Path, header: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > ROTATE_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    record = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    record.write(f"{header}\n")
    return record


@contextlib.contextmanager
def _diverted(number: int, target: int) -> Iterator[None]:
    """Within it, what is written to descriptor `number` goes to `target`."""
    before = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        os.dup2(before, number)
        os.close(before)


@contextlib.contextmanager
def _copied(number: int, path: str) -> Iterator[None]:
    """Within it, what is written to descriptor `number` goes to a file too."""
    try:
        # In a session of its own, it is not ended by the signal that asks the ranks to stop.
        tee = subprocess.Popen((*TEE, path), stdin=subprocess.PIPE, stdout=number, start_new_session=True)
    except OSError as error:
        log.warn(f"{path} has the log's lines alone: {error}")
        yield
        return
    try:
        with _diverted(number, tee.stdin.fileno()):
            yield
    finally:
        tee.stdin.close()
        # A process that was started meanwhile may hold the other end of the pipe.
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(2)


def _flush(stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
