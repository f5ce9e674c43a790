"""The supervisor of a run: starts its launcher again after a crash, a hang or a lost rank. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_lite import log
from megatron_lite.errors import EXIT_ERROR
from megatron_lite.monitor import exit_file
from megatron_lite.parallel.launcher import descendants

HISTORY = "restarts.jsonl"
"""Of the run folder: a line an attempt that ended."""

_PASSING = {"error", "checkpoint_not_saved", "hang", "lost_rank", "the_launcher_is_gone"}
"""Causes in `exit.json` that another attempt may not meet; with any other the run is done, or would fail alike."""
_LONGEST_PAUSE = 120.0
_SURVIVORS_SECONDS = 60.0
"""How long processes of an attempt may outlive its launcher: a save on the way out takes up to 25 s."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclasses.dataclass(frozen=True)
class Patience:
    """When an attempt is followed by another."""

    restarts: int
    """At most."""
    fruitless: int = 3
    """Attempts in a row that publish no newer checkpoint, after which none follows."""
    pause_seconds: float = 5.0
    """Before an attempt that follows a fruitless one; twice as long after each further one."""

    def pause(self, fruitless: int) -> float:
        """Seconds after so many fruitless attempts in a row: a run that makes progress goes on at once."""
        return min(self.pause_seconds * 2 ** (fruitless - 1), _LONGEST_PAUSE) if fruitless else 0.0


@dataclasses.dataclass(frozen=True)
class _End:
    """How an attempt ended."""

    cause: str | None
    """None where the run could not tell."""
    code: int
    message: str

    @property
    def may_pass(self) -> bool:
        return self.cause is None or self.cause in _PASSING

    def told(self) -> str:
        if self.cause is None:
            return f"the launcher ended with {_status(self.code)} and the run left no word"
        return f"{self.cause}{f': {self.message.splitlines()[0]}' if self.message else ''}"


class Supervisor:
    """Keeps a run going to its end.

    `command` starts its launcher, `run_dir` is where its `exit.json` goes, `newest_step` says how far its
    checkpoints are. Signals to stop are passed on, and nothing is started after one.
    """

    def __init__(self, command: Sequence[str], run_dir: Path, newest_step: Callable[[], int], patience: Patience):
        self._command, self._run_dir = list(command), run_dir
        self._newest_step, self._patience = newest_step, patience
        self._seen_step = 0
        self._launcher: subprocess.Popen | None = None
        self._stopped = threading.Event()

    def run(self) -> int:
        """Run to the end; the exit code that the last attempt stands for."""
        # Ranks whose launcher dies become children of this process, so that none is lost sight of.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._keep_going()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep_going(self) -> int:
        fruitless = 0
        for attempt in range(self._patience.restarts + 1):
            step, began = self._newest(), time.time()
            end = self._attempt()
            newest = self._newest()
            fruitless = 0 if newest > step else fruitless + 1
            self._note(attempt, end, newest, began)
            if self._stopped.is_set() or not end.may_pass:
                return end.code
            if reason := self._why_not_again(attempt, fruitless):
                log.warn(f"{end.told()}. {reason}")
                return end.code or EXIT_ERROR
            pause = self._patience.pause(fruitless)
            log.warn(
                f"{end.told()}. Starting again {f'in {pause:g} s' if pause else 'at once'} from step {newest} "
                f"(restart {attempt + 1} of {self._patience.restarts})"
            )
            if self._stopped.wait(pause):
                return end.code
        raise AssertionError("the last attempt is not followed by another")

    def _newest(self) -> int:
        """The newest step there is, or was when it could be told."""
        try:
            self._seen_step = self._newest_step()
        except OSError as error:
            log.warn(f"how far the checkpoints are cannot be told: {error}")
        return self._seen_step

    def _why_not_again(self, attempt: int, fruitless: int) -> str | None:
        if attempt == self._patience.restarts:
            return f"Giving up: it was restarted {attempt} times (--auto-restart {attempt})"
        if fruitless == self._patience.fruitless:
            return (
                f"Giving up: {fruitless} attempts in a row published no checkpoint after step {self._seen_step}; "
                "save more often, or mend what ends them"
            )
        return None

    def _attempt(self) -> _End:
        """Start the launcher and wait until it and all it started are gone."""
        exit_path = self._run_dir / exit_file.NAME
        stale, oldest = None, 0
        try:
            stale = _mark(exit_path)
        except OSError as error:
            oldest = time.time_ns()
            log.warn(f"{error}: it counts if it is written from now on")
        self._launcher = subprocess.Popen(self._command)
        if self._stopped.is_set():
            self._launcher.send_signal(signal.SIGTERM)  # it came while there was none to pass it on to
        code = self._launcher.wait()
        self._await_survivors()
        told = None
        with contextlib.suppress(OSError):
            mark = _mark(exit_path)
            if mark not in (None, stale) and mark.mtime_ns > oldest:
                told = exit_file.read_exit(self._run_dir)
        return _End(None, code if code >= 0 else 128 - code, "") if told is None else _End(*told)

    def _await_survivors(self) -> None:
        deadline = time.monotonic() + _SURVIVORS_SECONDS
        while left := self._survivors():
            if time.monotonic() > deadline:
                log.warn(f"{len(left)} processes outlived their launcher by {_SURVIVORS_SECONDS:g} s: ending them")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.1)

    def _survivors(self) -> list[int]:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return []
            if pid == 0:
                return descendants(os.getpid())

    def _pass_on(self, number: int, frame) -> None:
        self._stopped.set()
        if self._launcher is not None and self._launcher.returncode is None:
            self._launcher.send_signal(number)

    def _note(self, attempt: int, end: _End, newest: int, began: float) -> None:
        record = {
            "attempt": attempt,
            "began": _utc(began),
            "ended": _utc(time.time()),
            "cause": end.cause,
            "code": end.code,
            "newest_step": newest,
        }
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with open(self._run_dir / HISTORY, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warn(f"{HISTORY} could not be written: {error}")


class _Mark(NamedTuple):
    """What tells one version of a published file from another."""

    inode: int
    mtime_ns: int


def _mark(path: Path) -> _Mark | None:
    """That of a file; None where there is none. Raises OSError where that cannot be told."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _Mark(found.st_ino, found.st_mtime_ns)


def _status(code: int) -> str:
    """An exit code in words: 128 + N is a shell's for signal N, 256 - N that of DeepSpeed's launcher, which ends by -N,
    and 255 anyone's for a failure."""
    number = 256 - code if 192 < code < 255 else code - 128
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"exit code {code}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
