"""Each rank's file has all that it writes; the console has rank 0's, and what another says by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.monitor import rank_log

WRITES = """
import os, sys, threading
from pathlib import Path
from megatron_lite import log
from megatron_lite.monitor import rank_log
rank = int(sys.argv[2])
log.configure(rank, 4)
with rank_log.kept(Path(sys.argv[1]), rank, 4, "the command", several_nodes=True):
    print("printed")
    os.write(2, b"by native code\\n")
    log.note("by rank 0 alone")
    log.every_rank("by name")
    log.aside("aside")
    if len(sys.argv) > 3:
        os.abort()
print("after")
"""


def _run(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = [sys.executable, "-c", WRITES, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)


def test_the_console_has_rank_0_and_names_others(tmp_path):
    first, third = _run(tmp_path, 0), _run(tmp_path, 3)
    assert first.stdout == "printed\nafter\n" and third.stdout == "after\n"
    assert "by native code" in first.stderr and "by native code" not in third.stderr
    assert "by rank 0 alone" in first.stderr and "aside" not in first.stderr + third.stderr
    (line,) = third.stderr.splitlines()
    assert " rank 3/4 on " in line and line.endswith("] by name")
    for rank in (0, 3):
        lines = rank_log.path_of(tmp_path, rank).read_text().splitlines()
        assert lines[0].startswith("===== ") and f"rank {rank} of 4" in lines[0] and lines[0].endswith(": the command")
        said = "\n".join(lines)
        assert all(said.count(text) == 1 for text in ("printed", "by native code", "by name", "aside"))
    assert _run(tmp_path, 3).returncode == 0
    path = rank_log.path_of(tmp_path, 3)
    assert path.read_text().count("=====") == 2
    last = [line.partition("] ")[2] or line for line in rank_log.last_lines(tmp_path, 3, 4)]
    assert sorted(last) == ["aside", "by name", "by native code", "printed"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_words_of_a_crash_are_kept(rank, tmp_path):
    crashed = _run(tmp_path, rank, "abort")
    assert crashed.returncode == -6
    assert "by native code" in rank_log.path_of(tmp_path, rank).read_text()


def test_a_large_file_is_set_aside_and_one_that_cannot_be_written_is_said(tmp_path):
    path = rank_log.path_of(tmp_path, 2)
    path.parent.mkdir()
    with path.open("w") as large:
        large.truncate(rank_log.ROTATE_BYTES + 1)
    _run(tmp_path, 2)
    assert path.stat().st_size < 1000 and path.with_name(f"{path.name}.1").stat().st_size == rank_log.ROTATE_BYTES + 1
    (tmp_path / "file").write_text("")
    refused = _run(tmp_path / "file", 2)
    assert refused.returncode == 0 and "cannot be written" in refused.stderr and "by native code" in refused.stderr
    assert rank_log.last_lines(tmp_path / "file", 2, 5) == []
