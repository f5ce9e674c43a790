"""Worker processes that apply a function to a stream of items and give the results back in order."""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from megatron_lite.errors import DataError, MegatronLiteError

Item = TypeVar("Item")
Result = TypeVar("Result")
IN_FLIGHT = 2
"""Items a worker may have: one at work and one waiting, so that it does not idle while the parent writes."""


class WorkerLost(DataError):
    """A worker process that is gone, with its number and, if one killed it, the signal."""

    def __init__(self, message: str, pid: int | None, signal_number: int | None):
        super().__init__(message)
        self.pid, self.signal_number = pid, signal_number


def map_in_order(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int, copies: bool = False
) -> Iterator[Result]:
    """`map(make(), items)` by that many processes, each of which calls `make` once; by none if it is one.

    With `copies` they begin as copies of this process, where that is safe, with all it has loaded and built: at once,
    and sharing its memory. `make` and what it makes must then not depend on threads.

    Item k goes to worker k mod `workers`, and at most two items a worker are in memory. Call it on the
    main thread. An error of ours is raised here as itself. Raises WorkerLost when one is lost:
    each has a pipe of its own, so even a result that was cut off in the middle ends in an end of file.
    """
    if workers == 1:
        yield from map(make(), items)
        return
    with contextlib.ExitStack() as running:
        with interrupts_ignored():
            pool: list[Worker] = []
            method = "fork" if copies and can_be_copied() else "spawn"
            for _ in range(workers):
                pool.append(running.enter_context(Worker(make, method, pool)))
            running.callback(lambda: [worker.kill() for worker in pool])  # all, before one is waited for
        waiting: collections.deque[Worker] = collections.deque()
        for number, item in enumerate(items):
            if len(waiting) == IN_FLIGHT * workers:
                yield waiting.popleft().receive()
            pool[number % workers].send(item)
            waiting.append(pool[number % workers])
        while waiting:
            yield waiting.popleft().receive()


def can_be_copied() -> bool:
    """Whether this process can: a copy has none of the threads, and waits for ever for a lock that one of them held."""
    return sys.platform == "linux" and threading.active_count() == 1


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """What processes started in here inherit: an interrupt reaches all, and the parent alone answers it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Worker:
    """A process and this end of its pipe. It holds nothing of value and is killed when done with."""

    def __init__(self, make: Callable[[], Callable], method: str = "spawn", earlier: Sequence[Worker] = ()):
        context = multiprocessing.get_context(method)
        self._connection, theirs = context.Pipe()
        # Ends of pipes that a copy has but is not to keep: a worker would outlive the parent by them.
        kept = [worker._connection for worker in (*earlier, self)] if method == "fork" else []
        self._process = context.Process(target=_serve, args=(make, theirs, kept), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, item: Any) -> None:
        try:
            self._connection.send(item)
        except OSError:
            raise self._lost() from None

    def receive(self) -> Any:
        try:
            result = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(result, MegatronLiteError):
            raise result
        return result

    def _lost(self) -> WorkerLost:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return WorkerLost(
            f"a worker process {how}; if the machine ran out of memory, use fewer --workers, or split documents of "
            "hundreds of megabytes",
            self._process.pid,
            -code if code is not None and code < 0 else None,
        )

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and wait until it has."""
        self.kill()
        self._process.join()
        self._connection.close()


def _serve(make: Callable[[], Callable], connection: Connection, of_parent: Sequence[Connection]) -> None:
    """The life of a worker: it ends when the parent's end of the pipe does, in whatever it is doing."""
    for end in of_parent:
        end.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        function = make()
    except MegatronLiteError as error:
        function = functools.partial(_fail, error)
    while True:
        try:
            result = function(inbox.get())
        except MegatronLiteError as error:
            result = error
        try:
            connection.send(result)
        except OSError:
            os._exit(0)


def _fail(error: MegatronLiteError, _: Any) -> NoReturn:
    raise error


def _receive(connection: Connection, inbox: queue.SimpleQueue) -> None:
    # Read at once what is sent: the parent must never wait to send while this worker waits to answer.
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
