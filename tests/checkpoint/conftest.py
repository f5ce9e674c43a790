"""Ranks as threads of one process, for the many small saves and loads of these tests."""

import json
import threading

import pytest


class ThreadRank:
    """One of several threads that meet in `gather_json`."""

    def __init__(self, rank, size, slots, meeting):
        self.global_rank, self.world_size = rank, size
        self._slots, self._meeting = slots, meeting

    def gather_json(self, value):
        self._slots[self.global_rank] = json.dumps(value)
        self._meeting.wait(30)
        values = [json.loads(text) for text in self._slots]
        self._meeting.wait(30)
        return values


@pytest.fixture(scope="session")
def as_ranks():
    """`as_ranks(fn, size, *args)`: what `fn(ranks, *args)` returned, or the exception it raised, by rank."""

    def run(fn, size, *args):
        slots, results, meeting = [None] * size, [None] * size, threading.Barrier(size)

        def main(rank):
            try:
                results[rank] = fn(ThreadRank(rank, size, slots, meeting), *args)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.fixture
def one_rank():
    """A world of one rank."""
    return ThreadRank(0, 1, [None], threading.Barrier(1))


@pytest.fixture
def no_fsync(monkeypatch):
    """For tests of what is written, not of its surviving a power cut."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
