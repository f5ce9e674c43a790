"""A rank that is lost is found out and named by one of the others, whatever they wait for."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import ranks
import torch.distributed as dist

from megatron_lite.errors import EXIT_LOST_RANK
from megatron_lite.parallel import roll_call
from megatron_lite.parallel.roll_call import Lost, RollCall, lost_rank, this_place

assert ranks.run_on_ranks, "its import has torch loaded before processes are forked"


def _rank(rank: int, port: int, deed: str, patience: float, connection) -> None:
    """One of four ranks, which does its deed once all are ready and says what it learned."""
    roll_call.GIVE_UP_SECONDS = patience
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    roll = RollCall(store, rank, 4, keeper=None)
    store.set(f"place {rank}", json.dumps(this_place()))
    roll.watch_neighbours([json.loads(store.get(f"place {other}")) for other in range(4)])
    roll.give_up = lambda error, lost: connection.send((str(error), error.is_told_elsewhere, lost))
    store.set(f"ready {rank}", "")
    store.wait([f"ready {other}" for other in range(4)])
    if deed == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "fails":
        store.get("fail now")
        roll.leave("OutOfMemoryError: too much")
    elif deed == "hangs":
        time.sleep(120)
    elif deed == "asks":
        store.get("ask now")
        connection.send(roll.who_is_lost())
    roll.leave()
    roll.close()


def _run(deeds: list[str], patience: float = 60.0, then=lambda processes, store: None) -> tuple[list[int], list]:
    """Exit codes of four ranks with these deeds, and what each said."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in deeds]
    processes = [
        context.Process(target=_rank, args=(rank, store.port, deed, patience, pipes[rank][1]), daemon=True)
        for rank, deed in enumerate(deeds)
    ]
    try:
        for process, (_, sends) in zip(processes, pipes, strict=True):
            process.start()
            sends.close()
        then(processes, store)
        store.set("ask now", "")
        for process in processes:
            process.join(90)
        said: list = [None] * 4
        for rank, (receives, _) in enumerate(pipes):
            with contextlib.suppress(EOFError):
                said[rank] = receives.recv()
        return [process.exitcode for process in processes], said
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_rank_that_dies_and_one_that_fails_are_named_by_one_of_the_others():
    def one_after_the_other(processes, store):
        processes[1].join(60)
        # By then it has been called, and has answered, because of the one that died.
        store.wait(["rank 2"])
        store.set("fail now", "")
        processes[2].join(60)

    codes, said = _run(["asks", "is killed", "fails", "asks"], then=one_after_the_other)
    assert codes == [0, -signal.SIGKILL, 0, 0]
    (first, tells_first), (last, tells_last) = said[0], said[3]
    host = this_place()["host"]
    lost = {1: Lost(f"on {host}: its process ended", False), 2: Lost(f"on {host}: OutOfMemoryError: too much", True)}
    assert first == last == lost and tells_first != tells_last
    error = lost_rank(lost, "seen")
    assert error.exit_code == EXIT_LOST_RANK
    assert str(error) == f"lost rank 1 {lost[1].what}; rank 2 {lost[2].what} (seen)"


def test_ranks_that_wait_for_a_dead_one_are_ended_without_a_launcher():
    codes, said = _run(["hangs", "is killed", "hangs", "hangs"], patience=0.5)
    assert codes == [EXIT_LOST_RANK, -signal.SIGKILL, EXIT_LOST_RANK, EXIT_LOST_RANK]
    lost = {1: Lost(f"on {this_place()['host']}: its process ended", False)}
    assert all("lost rank 1 on" in said[rank][0] and said[rank][2] == lost for rank in (0, 2, 3))
    assert sorted(said[rank][1] for rank in (0, 2, 3)) == [False, True, True]


def test_a_rank_that_ends_in_order_alarms_nobody():
    codes, said = _run(
        ["ends", "asks", "ends", "asks"], then=lambda processes, _: [processes[n].join(60) for n in (0, 2)]
    )
    assert codes == [0, 0, 0, 0] and said[1][0] == said[3][0] == {}


@contextlib.contextmanager
def _kept_elsewhere():
    """A store in a process of its own, and what ends that."""
    code = "import sys, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"
    code += "; print(s.port, flush=True); sys.stdin.read()"
    keeper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end():
        keeper.kill()
        keeper.wait()

    try:
        yield dist.TCPStore("127.0.0.1", int(keeper.stdout.readline()), timeout=timedelta(seconds=30)), end
    finally:
        end()


def test_a_store_that_goes_is_the_loss_of_its_keeper(monkeypatch):
    monkeypatch.setattr(roll_call, "GIVE_UP_SECONDS", 60.0)
    with _kept_elsewhere() as (store, end):
        roll = RollCall(store, 1, 3)
        end()
    assert roll.who_is_lost() == ({0: Lost("its process or its node is gone", spoke=False)}, True)
    roll.close()


def test_a_node_that_goes_with_the_store_is_told_once_on_each_machine_that_is_left(monkeypatch):
    monkeypatch.setattr(roll_call, "GIVE_UP_SECONDS", 60.0)
    here, there = this_place(), {"host": "far", "pid": 1, "machine": "another"}
    neighbour = here | {"pid": os.getppid()}
    with _kept_elsewhere() as (store, end):
        first, second = RollCall(store, 2, 4), RollCall(store, 3, 4)
        first.watch_neighbours([there, there, here, neighbour])
        second.watch_neighbours([there, there, neighbour, here])
        end()
    lost = {
        0: Lost("on far: its process or its node is gone", spoke=False),
        1: Lost("on far: its node may be gone as well", spoke=False),
    }
    assert first.who_is_lost() == (lost, True) and second.who_is_lost() == (lost, False)
    for roll in (first, second):
        roll.close()


def test_a_launchers_store_that_goes_is_the_loss_of_the_other_node_where_there_are_two():
    here, far, further = this_place(), *({"host": name, "pid": 1, "machine": name} for name in ("far", "further"))
    with _kept_elsewhere() as (store, end):
        of_two, of_three = RollCall(store, 2, 3, keeper=None), RollCall(store, 2, 3, keeper=None)
        of_two.watch_neighbours([far, far, here])
        of_three.watch_neighbours([far, further, here])
        end()
    gone = Lost("on far: its process, its launcher or its node is gone", spoke=False)
    assert of_two.who_is_lost() == ({0: gone, 1: gone}, True) and not of_two.can_ask
    assert of_three.who_is_lost() == ({}, True) and not of_three.can_ask
    assert "the launcher's store cannot be reached" in str(lost_rank({}, "seen", of_three.can_ask))
    for roll in (of_two, of_three):
        roll.close()


def test_what_the_stores_keeper_said_is_known_when_it_is_gone(monkeypatch):
    monkeypatch.setattr(roll_call, "GIVE_UP_SECONDS", 60.0)
    monkeypatch.setattr(roll_call, "HEARING_SECONDS", 60.0)
    with _kept_elsewhere() as (store, end):
        keeper, other = RollCall(store, 0, 2), RollCall(store, 1, 2)
        keeper.leave("OutOfMemoryError: too much")
        keeper.close()
        end()
    assert other.who_is_lost() == ({0: Lost("OutOfMemoryError: too much", spoke=True)}, True)
    other.close()


def _stuck_on_its_way_out() -> None:
    roll_call.WAY_OUT_SECONDS = 0.1
    RollCall(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0, 2).bound_the_end(EXIT_LOST_RANK)
    time.sleep(120)


def test_a_rank_stuck_on_its_way_out_ends():
    process = multiprocessing.get_context("forkserver").Process(target=_stuck_on_its_way_out, daemon=True)
    process.start()
    process.join(90)
    assert process.exitcode == EXIT_LOST_RANK


def test_who_ends_after_a_rank_has_closed_is_none_of_its_business():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    neighbour = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        roll = RollCall(store, 0, 2, keeper=None)
        roll.watch_neighbours([this_place(), this_place() | {"pid": neighbour.pid}])
        watching = [thread for thread in threading.enumerate() if thread.name == "neighbours"]
        roll.leave()
        roll.close()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert len(watching) == 1 and not watching[0].is_alive() and not store.check(["rank 1"])


def test_one_rank_alone_asks_nobody():
    before = threading.active_count()
    roll = RollCall(None, 0, 1)
    roll.watch_neighbours([this_place()])
    assert roll.who_is_lost() == ({}, True) and roll.is_first_to("speak") and threading.active_count() == before
    roll.leave("an error")
    roll.close()
