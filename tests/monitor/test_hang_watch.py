"""The watch learns how long a stretch may take, and does not count time in which nobody ran."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_lite.monitor import hang_watch
from megatron_lite.monitor.hang_page import Seat
from megatron_lite.monitor.hang_watch import HangWatch, Limit, process_state, take_word
from megatron_lite.parallel import whereabouts
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.whereabouts import CHECKPOINT, STEP, VALIDATION, Whereabouts


@pytest.fixture
def here(monkeypatch):
    fresh = Whereabouts()
    monkeypatch.setattr(whereabouts, "HERE", fresh)
    monkeypatch.setattr(hang_watch, "HERE", fresh)
    return fresh


def test_limits(here):
    learned, fixed = Limit(None, 10), Limit(0.5, 10)
    assert [limit.seconds(STEP) for limit in (learned, fixed)] == [600, 600], "the first may compile"
    here.times[STEP] += [2.0, 30.0, 1.0]
    assert [limit.seconds(STEP) for limit in (learned, fixed)] == [300, 30]
    assert [limit.seconds(VALIDATION) for limit in (learned, fixed)] == [600, 600]
    here.times[VALIDATION] += [0.1]
    assert [limit.seconds(VALIDATION) for limit in (learned, fixed)] == [60, 30]
    assert learned.seconds(CHECKPOINT) == fixed.seconds("start") == math.inf
    here.times[STEP] += [1.0] * whereabouts.RECENT
    assert learned.seconds(STEP) == 60, "slow steps long ago are forgotten"


def test_stretches_are_timed_and_counted(here):
    for step in range(3):
        here.begin(STEP, step + 1)
        here.note("micro-batch", 1, "of", 4)
        here.awaited["the input",] = 3
    here.begin(CHECKPOINT, 3)
    assert len(here.times[STEP]) == 3 and here.stretch.place == 4 and str(here.stretch) == "checkpoint 3"
    assert not here.doing and not here.awaited


def test_the_watch_speaks_once_and_whoever_closes_it_then_waits(here, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or gone.set() or threading.Event().wait(0.5))
    ended, gone, told = [], threading.Event(), []
    seats = [Seat("here", os.getpid())]
    watch = HangWatch(0, MeshShape(), seats, ["this"], tmp_path / "hang", Limit(0.005, 0.005), told.append)
    here.begin(STEP, 1)
    here.note("a wait that does not end")
    watch.start(tick=0.05)
    assert gone.wait(30)
    watch.close()
    assert ended[0] == 4 and len(told) == 1
    assert "training step 1, a wait that does not end" in (tmp_path / "hang" / "page.txt").read_text()


def test_what_a_process_is_kept_from():
    assert process_state(os.getpid()) is None
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(child.pid) == "its process is dead"
    child.wait()
    assert process_state(child.pid) == "its process is gone"


def _words() -> list:
    rank, data = dist.get_rank(), torch.ones(4)
    group = dist.new_group([0, 1], group_desc="data")
    for _ in range(3):
        dist.all_reduce(data, group=group)
    work = dist.all_reduce(data, group=group, async_op=True) if rank == 0 else None
    dist.barrier()
    expected, deadline = (4, False) if rank == 0 else (3, True), time.monotonic() + 30
    while True:
        # The record is written by gloo's threads, a moment later.
        found = next(c for c in take_word(rank, threading.main_thread().ident).collectives if c.over == "data")
        if (found.number, found.is_over) == expected or time.monotonic() > deadline:
            break
    if rank == 1:
        dist.all_reduce(data, group=group)
    if work is not None:
        work.wait()
    return list(found)[2:]


def test_torchs_record_tells_the_collective_a_rank_is_in():
    mine, theirs = run_on_ranks(_words, 2)
    assert mine == ["all_reduce", 4, False] and theirs == ["all_reduce", 3, True]
