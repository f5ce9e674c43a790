"""`metrics.jsonl`: one JSON object a line, one line a step, the history of a run across resumes.

Every line is strict JSON. A number that JSON cannot write is null, and `non_finite` of the same
object says what it was: `{"step": 7, "grad_norm": null, "non_finite": {"grad_norm": "inf"}}`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_lite import log

Record = dict[str, float | int]


def encode(record: Record) -> str:
    """`record` as one line of strict JSON without a line end."""
    odd = {name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    written: dict[str, Any] = {name: None if name in odd else value for name, value in record.items()}
    if odd:
        written["non_finite"] = odd
    return json.dumps(written, allow_nan=False)


def decode(line: str | bytes) -> Record | None:
    """The record `line` holds, or None where it is not a whole JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    record.update({name: float(text) for name, text in record.pop("non_finite", {}).items()})
    return record


def read_history(path: str | os.PathLike) -> list[Record]:
    """The records of a `metrics.jsonl`, in order; damaged lines are left out."""
    with open(path, "rb") as file:
        return [record for record in map(decode, file) if record is not None]


class JsonLinesSink:
    """Appends records to a `metrics.jsonl`, each line on disk before the next step.

    Opening it takes back what is after `resume_step` (0 for a run from the start) and lines that
    a crash left unfinished, by a rewritten file under a new name and a rename. Raises OSError.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._take_back(resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._end = self._file.seek(0, os.SEEK_END)

    def _take_back(self, resume_step: int) -> None:
        rewritten = self.path.with_name(self.path.name + ".tmp")
        later = damaged = 0
        with open(self.path, "rb") as old, open(rewritten, "wb") as new:
            for line in old:
                record = decode(line)
                if record is None or not line.endswith(b"\n"):
                    damaged += 1
                elif record.get("step", 0) > resume_step:
                    later += 1
                else:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        if later or damaged:
            os.replace(rewritten, self.path)
            log.note(f"{self.path}: took back {later} records after step {resume_step} and {damaged} damaged lines")
        else:
            rewritten.unlink()

    def write(self, record: Record) -> None:
        """Append one line, whole or not at all. Raises OSError."""
        line = encode(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: only part of a line could be written")
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(line)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
