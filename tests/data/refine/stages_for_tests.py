"""Functions that recipes of the tests name: they fail, kill or count where a text says so."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def fails(text: str) -> float:
    """The length of a text, unless it asks for an error."""
    if "ZERO" in text:
        return 1 / 0
    return len(text)


def gives_no_number(text: str) -> float:
    """NaN."""
    return float("nan")


def leaves(text: str) -> float:
    """As a library does that ends the program instead of raising an Exception."""
    if "LEAVE" in text:
        sys.exit(7)
    return 1.0


def faults(text: str) -> float:
    """1, but native code that is handed a bad pointer by a text that asks for it."""
    if "FAULT" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


class Dies:
    """Kills its process at a text that asks for it, while `folder` has fewer than `times` marks of that."""

    def __init__(self, folder: str, times: int):
        self._folder, self._times = Path(folder), times

    def __call__(self, text: str) -> float:
        if text.startswith("KILL"):
            marks = len(list(self._folder.iterdir()))
            if marks < self._times:
                (self._folder / f"{marks}-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return 1.0
