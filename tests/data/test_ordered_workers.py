"""Workers keep the order, pass errors on, and when one dies the parent says so instead of waiting."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_lite.data.ordered_workers import map_in_order
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError


def makes(function, *arguments) -> functools.partial:
    """What makes, in the worker, a function of which the first arguments are given."""
    return functools.partial(functools.partial, function, *arguments)


@pytest.mark.parametrize(("workers", "copies"), [(1, False), (3, False), (3, True)])
def test_order_is_kept_and_little_is_taken_ahead(workers, copies):
    taken: list[int] = []
    numbers = (taken.append(number) or number for number in range(1, 41))
    for received, result in enumerate(map_in_order(makes(pow, 2), numbers, workers, copies), 1):
        assert result == 2**received
        assert len(taken) - received <= 2 * workers
    assert received == 40


def test_results_larger_than_a_pipe_do_not_block():
    assert [len(x) for x in map_in_order(makes(bytes), [1 << 22] * 9, 2)] == [1 << 22] * 9


def test_our_errors_come_through():
    results = map_in_order(makes(find_sources), [["-"], ["missing.jsonl"], ["-"]], 2)
    assert next(results)[0].path == "-"
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        next(results)
    assert not children()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def refuse():
    raise DataError("the package x is missing")


@pytest.mark.parametrize("copies", [False, True])
def test_an_error_of_making_the_function_comes_through(copies):
    with pytest.raises(DataError, match="the package x is missing"):
        list(map_in_order(refuse, range(9), 2, copies))


def test_a_worker_that_ends_is_reported():
    with pytest.raises(DataError, match="a worker process ended with exit code 3"):
        list(map_in_order(makes(os._exit), [3, 3], 2))
    assert not children()


def test_a_worker_killed_in_the_middle_of_an_answer_is_reported():
    def items():
        yield 1 << 26
        yield 1
        time.sleep(1)  # until the first answer fills the pipe
        for child in children():
            child.kill()
        yield 1

    with pytest.raises(DataError, match="a worker process was killed by signal 9"):
        list(map_in_order(makes(bytes), items(), 2))


def test_leaving_early_ends_the_workers():
    results = map_in_order(makes(time.sleep), [0, 1000, 1000], 2)
    next(results)
    assert len(children()) == 2
    start = time.monotonic()
    results.close()
    assert not children() and time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="copies are for Linux")
def test_copies_have_what_was_built_and_are_made_of_one_thread_alone():
    script = """
from megatron_lite.data.ordered_workers import map_in_order
built = []
results = map_in_order(lambda: lambda item: (len(built), item), range(2), 2, copies=True)
built.append("before the start")
assert list(results) == [(1, 0), (1, 1)]
"""
    # Of its own: tests that were run before may have left a thread here.
    done = run_alone(script)
    assert done.returncode == 0, done.stderr.decode()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        # Started anew: what is made must travel, and this cannot.
        with pytest.raises((pickle.PicklingError, AttributeError)):
            list(map_in_order(lambda: abs, range(2), 2, copies=True))
    finally:
        release.set()
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="copies are for Linux")
def test_copies_end_with_a_parent_that_is_killed(tmp_path):
    """Each has the ends of pipes that were there before it; none may hold another one up by them."""
    script = """
import os, signal, sys
from megatron_lite.data.ordered_workers import map_in_order
for pid in map_in_order(lambda: lambda item: os.getpid(), iter(range(3)), 3, copies=True):
    print(pid)
sys.stdout.flush()
results = map_in_order(lambda: lambda item: (print(os.getpid(), flush=True), item)[1], range(9), 3, copies=True)
next(results)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_alone(script)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) >= 4
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def run_alone(script: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=False)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
