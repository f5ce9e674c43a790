"""Files that appear whole or not at all: written beside their place under another name, then renamed.

Where several belong together, an interrupt waits for a moment at which none or all are there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def published(path: str | os.PathLike, synced: bool = True, within: Path | None = None) -> Iterator[Path]:
    """The temporary path to write a file to, in a folder that is made; it becomes `path` when the block ends well.

    It lies beside `path`, or in the folder `within`, which is on the same disk and cleared after a kill.

    Its bytes are on disk before it has its name, if it is `synced`: without, it is whole after a kill, but not after a
    loss of power. After an error nothing is left. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (within or path.parent) / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        if synced:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(path: str | os.PathLike, content: str | bytes, within: Path | None = None) -> None:
    """Write a file, text as UTF-8, as `published` does."""
    with published(path, within=within) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def interrupts_awaited() -> Iterator[Callable[[], None]]:
    """A block that SIGINT and SIGTERM end only where it calls the function this yields, by KeyboardInterrupt.

    One that comes after the last call comes too late and has no effect. For the main thread.
    """
    came = []
    before = {}

    def end_if_asked() -> None:
        if came:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield end_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def insist_on_place(path: str | os.PathLike) -> None:
    """Raise OSError now if `publish` could not write to `path` later. Makes nothing."""
    path = Path(path).absolute()
    if path.is_dir():
        raise _failure(errno.EISDIR, path)
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise _failure(errno.ENOTDIR, folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _failure(errno.EACCES, folder)


def _failure(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
