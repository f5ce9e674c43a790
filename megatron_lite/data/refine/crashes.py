"""Which document a worker was at when a stage killed it, so that the document is set aside and the others go on."""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
from pathlib import Path

from megatron_lite.data.ordered_workers import WorkerLost
from megatron_lite.publish import publish

_PLACE = struct.Struct("<qqq")
_OF_A_FAULT = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that native code brings on itself; others, as of a machine out of memory, say nothing about the document."""

Crashes = dict[int, dict[int, tuple[int, int]]]
"""Unit to document to (stage, signal)."""


class Whereabouts:
    """The place a worker is at, in a file that outlives it."""

    def __init__(self, folder: Path):
        with open(_path(folder, os.getpid()), "w+b") as file:
            file.truncate(_PLACE.size)
            self._map = mmap.mmap(file.fileno(), _PLACE.size)

    def note(self, unit: int, document: int, stage: int) -> None:
        """Say what is about to be done."""
        _PLACE.pack_into(self._map, 0, unit, document, stage)


def _path(folder: Path, pid: int) -> Path:
    return folder / f"at-{pid}"


def read_crashes(folder: Path) -> Crashes:
    """The documents of a pass that killed their worker."""
    path = folder / "crashes.json"
    stored = json.loads(path.read_bytes()) if path.exists() else {}
    return {int(unit): {int(at): tuple(how) for at, how in of.items()} for unit, of in stored.items()}


def blame(folder: Path, lost: WorkerLost) -> bool:
    """Note the document a lost worker was at, if that is to blame; whether it is."""
    if lost.signal_number not in _OF_A_FAULT:
        return False
    try:
        unit, document, stage = _PLACE.unpack(_path(folder, lost.pid).read_bytes())
    except (OSError, struct.error):
        return False
    crashes = read_crashes(folder)
    if document in crashes.get(unit, {}):
        return False
    crashes.setdefault(unit, {})[document] = (stage, lost.signal_number)
    publish(folder / "crashes.json", json.dumps(crashes))
    return True
