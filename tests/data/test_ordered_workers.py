"""Workers keep the order, pass errors on, and when one dies the parent says so instead of waiting."""

from __future__ import annotations

import functools
import os
import time

import psutil
import pytest

from megatron_lite.data.ordered_workers import map_in_order
from megatron_lite.data.text_input import find_sources
from megatron_lite.errors import DataError


def makes(function, *arguments) -> functools.partial:
    """What makes, in the worker, a function of which the first arguments are given."""
    return functools.partial(functools.partial, function, *arguments)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_is_kept_and_little_is_taken_ahead(workers):
    taken: list[int] = []
    numbers = (taken.append(number) or number for number in range(1, 41))
    for received, result in enumerate(map_in_order(makes(pow, 2), numbers, workers), 1):
        assert result == 2**received
        assert len(taken) - received <= 2 * workers
    assert received == 40


def test_results_larger_than_a_pipe_do_not_block():
    assert [len(x) for x in map_in_order(makes(bytes), [1 << 22] * 9, 2)] == [1 << 22] * 9


def test_our_errors_come_through():
    results = map_in_order(makes(find_sources), [["-"], ["missing.jsonl"], ["-"]], 2)
    assert next(results)[0].path == "-"
    with pytest.raises(DataError, match=r"--input missing\.jsonl: no such file"):
        next(results)
    assert not children()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


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
