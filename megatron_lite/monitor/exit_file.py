"""`exit.json`: how a run ended, for tools, whatever launchers make of the exit code."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from megatron_lite.credentials import without_credentials
from megatron_lite.publish import publish

NAME = "exit.json"


def write_exit(
    run_dir: str | os.PathLike, cause: str, code: int, step: int | None, how_to_go_on: str, message: str = ""
) -> Path:
    """Write `exit.json` into `run_dir`, whole or not at all, and return its path.

    `cause` is one word ("done", "signal", or the `cause` of an error), `code` the exit code of the
    ranks, `step` the last step done (None where a run never began), `how_to_go_on` a command or
    sentence. Raises OSError.
    """
    path = Path(run_dir) / NAME
    record = {
        "cause": cause,
        "code": code,
        "step": step,
        "how_to_go_on": how_to_go_on,
        "message": without_credentials(message),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    publish(path, json.dumps(record, indent=2) + "\n")
    return path


def read_exit(run_dir: str | os.PathLike) -> tuple[str, int, str] | None:
    """Cause, code and message that a run left behind; None where there is nothing that can be read."""
    try:
        record = json.loads((Path(run_dir) / NAME).read_bytes())
        told = record["cause"], record["code"], record["message"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return told if tuple(map(type, told)) == (str, int, str) else None


def is_there(run_dir: str | os.PathLike | None) -> bool:
    """Whether this run has told already how it ended."""
    return run_dir is not None and (Path(run_dir) / NAME).exists()


def remove_exit(run_dir: str | os.PathLike) -> None:
    """Take away the `exit.json` of an earlier run, so that one that is killed leaves none."""
    (Path(run_dir) / NAME).unlink(missing_ok=True)
