"""The watch learns how long a stretch may take, and does not count time in which nobody ran."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_lite.monitor import hang_watch
from megatron_lite.monitor.hang_page import Page, Seat
from megatron_lite.monitor.hang_watch import HangWatch, Limit, process_state, take_word
from megatron_lite.parallel import whereabouts
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.whereabouts import CHECKPOINT, STEP, VALIDATION, Collective, Whereabouts
from megatron_lite.publish import publish


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
        here.order(3, "the input")
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


@pytest.fixture
def watched(here, tmp_path, monkeypatch):
    """Watches of ranks that share this process, which raise what they would say in place of ending it."""

    def speak(watch, reason):
        said.append(reason)
        watch._over.set()

    said: list[str] = []
    monkeypatch.setattr(HangWatch, "_speak_and_end", speak)

    def watch(limit: Limit, after: float) -> str:
        """What is said within so many seconds of a clock that moves at every look."""
        said.clear()
        made = HangWatch(0, MeshShape(), [Seat("here", 1)], ["this"], tmp_path / "none", limit, lambda page: None)
        clock = iter(range(10**6))
        monkeypatch.setattr(hang_watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        monkeypatch.setattr(made._over, "wait", lambda tick: made._over.is_set() or not next(looks, 0))
        looks = iter([1] * int(after))
        made._run(1.0)
        return said[0] if said else ""

    return watch


def test_an_exchange_that_nobody_gives_up_is_noticed_in_whatever_stretch(here, watched, monkeypatch):
    stuck = [Collective("1", "data", "all_reduce", 5, False, 3600.0), Collective("2", "all", "barrier", 9, True)]
    monkeypatch.setattr(whereabouts, "collectives", lambda: stuck)
    limit = Limit(None, 10, 10)
    for kind in ("start", CHECKPOINT, STEP):
        here.begin(kind, 7)
        here.times[kind].append(600.0)
        assert watched(limit, 590) == ""
        assert watched(limit, 620) == "all_reduce 5 over data did not end within 600 s (--distributed-timeout-minutes)"
    # gloo gives up by itself.
    assert watched(Limit(None, 10), 620) == ""


def test_long_stretches_whose_exchanges_end_are_accused_of_nothing(here, watched, monkeypatch):
    monkeypatch.setattr(whereabouts, "collectives", lambda: [Collective("1", "data", "all_reduce", 5, False, 12.0)])
    here.begin(CHECKPOINT, 3)
    assert watched(Limit(None, 10, 10), 5000) == ""
    here.begin(STEP, 4)
    here.times[STEP].append(600.0)
    assert watched(Limit(None, 10, 10), 5000) == ""
    assert watched(Limit(None, 10, 10), 6100) == (
        "training step 4 did not end within 6e+03 s (10 times the slowest of the last 1, and at least 60 s)"
    )


def test_what_another_stage_does_not_send_is_noticed_by_its_age(here, watched, monkeypatch):
    monkeypatch.setattr(whereabouts, "collectives", list)
    here.begin(CHECKPOINT, 1)
    here.awaited["the input", "of stage", 1] = whereabouts.Order(2, -1e9)
    assert watched(Limit(None, 10, 10), 620).startswith("the input of stage 1 from rank 2 did not end within 600 s")


def test_the_first_step_may_take_long_while_its_parts_follow_one_another(here, watched, monkeypatch):
    monkeypatch.setattr(whereabouts, "collectives", list)
    here.begin(STEP, 1)
    parts = iter(range(10**6))
    monkeypatch.setattr(Whereabouts, "doing", property(lambda _: ("micro-batch", next(parts) // 500)), raising=False)
    assert watched(Limit(None, 10, 10), 5000) == ""
    monkeypatch.setattr(Whereabouts, "doing", property(lambda _: ("micro-batch", 1)))
    assert watched(Limit(None, 10, 10), 620).startswith("training step 1 did not end within 600 s (the first of")


def _page_of(tmp_path, words: list[int], machines: list[str], is_shared: bool) -> Page:
    """The page that rank 0 makes of those words, where each machine has two ranks, those on its own being gone."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    made: list[Page] = []
    seats = [Seat(name, gone.pid) for name in machines]
    shape = MeshShape(data=len(machines))
    watch = HangWatch(0, shape, seats, machines, tmp_path / "hang", Limit(None, 10), made.append, is_shared)
    for rank in words:
        publish(watch._word_file(rank), take_word(rank, threading.get_ident(), "a reason").to_json())
    watch._make_page()
    return made[0]


def test_ranks_of_other_machines_are_waited_for_longer_and_not_said_to_be_stopped(here, tmp_path, monkeypatch):
    monkeypatch.setattr(hang_watch, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(hang_watch, "FAR_PATIENCE_SECONDS", 1.5)
    gist = _page_of(tmp_path, [0, 3], ["a", "a", "b", "b"], is_shared=True).gist
    assert gist.startswith("rank 1 (a, process ") and "gave no word: its process is gone; rank 2 (b, " in gist
    assert "gave no word: not heard of for 2 s: it is stopped, or its node or its disk is gone" in gist


def test_without_a_folder_of_all_nodes_the_page_is_of_one_machine(here, tmp_path):
    made = _page_of(tmp_path, [0, 1], ["a", "a", "b", "b"], is_shared=False)
    assert "\n(as ranks 0 and 1 on a see it: without --save or --run-dir there is no folder" in made.text
    assert "rank 2" not in made.text.replace("ranks 0", "")


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
    expected, deadline = (4, False, True) if rank == 0 else (3, True, False), time.monotonic() + 30
    while True:
        # The record is written by gloo's threads, a moment later, and of what is under way the age grows.
        found = next(c for c in take_word(rank, threading.main_thread().ident).collectives if c.over == "data")
        if (found.number, found.is_over, found.seconds >= 0.2) == expected or time.monotonic() > deadline:
            break
    dist.barrier()
    if rank == 1:
        dist.all_reduce(data, group=group)
    if work is not None:
        work.wait()
    return [*found[2:5], found.seconds >= 0.2]


def test_torchs_record_tells_the_collective_a_rank_is_in():
    mine, theirs = run_on_ranks(_words, 2)
    assert mine == ["all_reduce", 4, False, True] and theirs == ["all_reduce", 3, True, False]
