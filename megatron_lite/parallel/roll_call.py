"""Which ranks are alive, asked of all of them when one seems not to be."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megatron_lite.errors import EXIT_LOST_RANK, LostRankError

T = TypeVar("T")

ANSWER_SECONDS = 5.0
"""How long a rank may take to answer before it counts as lost."""
GIVE_UP_SECONDS = 15.0
"""How long a rank that was called may stay where it is, which may be a collective that never ends."""
HEARING_SECONDS = 2.0
WAY_OUT_SECONDS = 40.0
"""How long a rank may take to end once the run cannot go on: the store, a disk or a tracker may not answer either.

It is more than answers and the last lines of logs take where all is well.
"""
_LOOK_MILLISECONDS = 200
_HERE, _GONE, _LEFT = "here", "gone", "left"


class Lost(NamedTuple):
    """What is known of a rank that is lost."""

    what: str
    spoke: bool
    """It said itself why it ended."""


class RollCall:
    """This rank's part in finding out who is lost: threads that answer, whatever the rank itself waits for.

    A rank calls when a connection breaks under it, when it fails by itself, or when the process of another rank on its
    machine ends without a word. Then each rank answers over the store (a torch.distributed Store all ranks share),
    one of them finds out who did not, and one that does not come out of a collective is ended: `give_up` is handed the
    LostRankError and the lost, then the process exits with its code. `keeper` is the rank that keeps the store, and is
    lost with it; None where the launcher keeps it.
    """

    def __init__(self, store, rank: int, world_size: int, keeper: int | None = 0):
        self.give_up: Callable[[LostRankError, dict[int, Lost]], object] = lambda error, lost: None
        self._rank, self._world_size, self._keeper = rank, world_size, keeper
        self._places: list[dict[str, Any]] = []
        self._taken_over = threading.Event()
        self._failed, self._keepers_words = False, ""
        self._store = None
        self._closed = threading.Event()
        self._answering: threading.Thread | None = None
        self._watching: threading.Thread | None = None
        if world_size > 1:
            # A store serves one thread at a time, so the one that waits has a connection to itself.
            self._store, bell = store.clone(), store.clone()
            self._answering = threading.Thread(target=self._answer, args=(bell,), daemon=True, name="roll-call")
            self._answering.start()

    def watch_neighbours(self, places: list[dict[str, Any]]) -> None:
        """Watch the processes of this machine's other ranks; `places` is `this_place()` of every rank, in order."""
        self._places = places
        machine = places[self._rank]["machine"]
        pids = {place["pid"]: rank for rank, place in enumerate(places) if place["machine"] == machine}
        del pids[os.getpid()]
        if pids:
            self._watching = threading.Thread(target=self._watch, args=(pids,), daemon=True, name="neighbours")
            self._watching.start()

    def leave(self, failure: str = "") -> None:
        """Say that this rank ends, so that its end is no riddle; the others are called because of a `failure`."""
        key, words = f"rank {self._rank}", f"{_LEFT} {failure}"
        # It may have answered already, because of another's end.
        is_said = self._claim(key, words) or (failure and self._claim(key, words, instead_of=_HERE))
        if is_said and failure:
            self._failed = True
            self._call()

    def who_is_lost(self) -> tuple[dict[int, Lost], bool]:
        """The lost ranks, and whether this rank is the one to tell it.

        Asks all ranks, which takes moments, or `ANSWER_SECONDS` where one does not answer.
        """
        self._taken_over.set()
        if self._world_size == 1:
            return {}, True
        self._call()
        tells = self._claim("teller", str(self._rank))
        if tells:
            self._ask(lambda store: store.set("lost", json.dumps(self._missing(store))))
        found = self._ask(self._await_answer)
        if self._store is None:
            return self._without_store()
        return {int(rank): Lost(*known) for rank, known in (found or {}).items()}, tells

    def named(self, seen: LostRankError) -> tuple[LostRankError, dict[int, Lost]]:
        """What to raise for `seen` once all ranks were asked, by `who_is_lost`; and the lost ranks."""
        lost, tells = self.who_is_lost()
        error = seen if not lost and self.can_ask else lost_rank(lost, str(seen), self.can_ask)
        error.is_told_elsewhere = not tells
        return error, lost

    @property
    def can_ask(self) -> bool:
        """False once the store is gone through which ranks are asked."""
        return self._world_size == 1 or self._store is not None

    def bound_the_end(self, exit_code: int, longer: float = 0.0) -> None:
        """See to it that this process has ended within `WAY_OUT_SECONDS`, or so much longer: others may wait for it."""
        if self._world_size > 1:
            timer = threading.Timer(WAY_OUT_SECONDS + longer, os._exit, [exit_code])
            timer.daemon = True
            timer.start()

    def is_first_to(self, deed: str) -> bool:
        """Whether no other rank has asked this of that deed: one says what all of them could."""
        return self._store is None or self._claim(deed, str(self._rank))

    def close(self) -> None:
        """Answer no more. The store's keeper waits moments for those yet to hear who is lost or why it fails."""
        self._taken_over.set()
        self._closed.set()
        if self._rank == self._keeper:
            self._ask(self._await_hearers)
        self._ask(lambda store: store.set(f"bell {self._rank}", "closed"))
        for thread in (self._answering, self._watching):
            # Python ends a thread that comes back to it late, and under the store's C++ code that is an abort.
            if thread is not None:
                thread.join(ANSWER_SECONDS)

    def _call(self) -> None:
        if self._claim("caller", str(self._rank)):
            bells = [f"bell {rank}" for rank in range(self._world_size)]
            self._ask(lambda store: store.multi_set(bells, ["rung"] * self._world_size))

    def _answer(self, bell) -> None:
        try:
            bell.wait([f"bell {self._rank}"], timedelta(days=365))
        except RuntimeError:
            if self._keeper is None:
                return  # the launcher is gone, and is watched by other means
            self._store = None
        self._claim(f"rank {self._rank}", _HERE)
        self._ask(self._hear_keeper)
        if not self._taken_over.wait(GIVE_UP_SECONDS):
            self.bound_the_end(EXIT_LOST_RANK)
            try:
                lost, tells = self.who_is_lost()
                error = lost_rank(lost, "it could not go on without", self.can_ask)
                error.is_told_elsewhere = not tells
                self.give_up(error, lost)
            finally:
                os._exit(EXIT_LOST_RANK)

    def _watch(self, pids: dict[int, int]) -> None:
        ends, ranks = select.poll(), {}
        for pid, rank in pids.items():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._found_gone(rank)
            except OSError:
                return  # a kernel or a sandbox without: the launcher has to notice
            else:
                ranks[descriptor] = rank
                ends.register(descriptor, select.POLLIN)
        # Not only until this rank asks who is lost: a connection breaks before the process has ended.
        while ranks and not self._closed.is_set():
            for descriptor, _ in ends.poll(_LOOK_MILLISECONDS):
                if self._closed.is_set():
                    return
                ends.unregister(descriptor)
                os.close(descriptor)
                self._found_gone(ranks.pop(descriptor))

    def _found_gone(self, rank: int) -> None:
        if self._claim(f"rank {rank}", _GONE):
            self._call()

    def _without_store(self) -> tuple[dict[int, Lost], bool]:
        """`who_is_lost` where nobody can be asked: the store is gone, and with it the rank or the node that kept it."""
        places, lost = self._places, {}
        here = places[self._rank]["machine"] if places else None
        if self._keeper is not None:
            said = self._keepers_words
            what = self._at(self._keeper, said or "its process or its node is gone")
            lost[self._keeper] = Lost(what, spoke=bool(said))
            if places and not said and here != places[self._keeper]["machine"]:
                for rank, place in enumerate(places):
                    if rank != self._keeper and place["machine"] == places[self._keeper]["machine"]:
                        lost[rank] = Lost(self._at(rank, "its node may be gone as well"), spoke=False)
        else:
            nodes = [(place["machine"], place["host"]) for place in places]
            others = [rank for rank, node in enumerate(nodes) if node != nodes[self._rank]]
            # The end of this node's launcher is watched by other means, so that of two it was the other's.
            if len({nodes[rank] for rank in others}) == 1:
                what = "its process, its launcher or its node is gone"
                lost = {rank: Lost(self._at(rank, what), spoke=False) for rank in others}
        mine = [rank for rank, place in enumerate(places) if place["machine"] == here and rank not in lost]
        return lost, self._rank == min(mine, default=self._rank)

    def _missing(self, store) -> dict[int, Lost]:
        answers: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(answers) < self._world_size and time.monotonic() < deadline:
            for rank in range(self._world_size):
                if rank not in answers and store.check([f"rank {rank}"]):
                    answers[rank] = store.get(f"rank {rank}").decode()
            time.sleep(0.05)
        lost = {}
        for rank in range(self._world_size):
            state, _, words = answers.get(rank, "").partition(" ")
            if state == _GONE:
                lost[rank] = Lost(self._at(rank, "its process ended"), spoke=False)
            elif state == _LEFT and words:
                lost[rank] = Lost(self._at(rank, words), spoke=True)
            elif not state:
                lost[rank] = Lost(self._at(rank, f"it did not answer within {ANSWER_SECONDS:g} s"), spoke=False)
        return lost

    def _await_answer(self, store) -> dict[str, tuple[str, bool]] | None:
        deadline = time.monotonic() + 2 * ANSWER_SECONDS
        while not store.check(["lost"]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        store.add("heard", 1)
        return json.loads(store.get("lost"))

    def _hear_keeper(self, store) -> None:
        """Note why the store's keeper ends, if it does: once it has, nobody can be asked."""
        if self._keeper is not None and store.check([f"rank {self._keeper}"]):
            state, _, words = store.get(f"rank {self._keeper}").decode().partition(" ")
            self._keepers_words = words if state == _LEFT else ""
        store.add("came", 1)

    def _await_hearers(self, store) -> None:
        deadline = time.monotonic() + HEARING_SECONDS
        while self._failed and store.add("came", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
        while store.check(["lost"]) and time.monotonic() < deadline:
            if store.add("heard", 0) + len(json.loads(store.get("lost"))) >= self._world_size:
                return
            time.sleep(0.05)

    def _at(self, rank: int, what: str) -> str:
        return f"on {self._places[rank]['host']}: {what}" if self._places else what

    def _claim(self, key: str, value: str, instead_of: str = "") -> bool:
        """Whether the store holds that value under a key that had none, or the one it is `instead_of`."""
        return self._ask(lambda store: store.compare_set(key, instead_of, value) == value.encode()) or False

    def _ask(self, act: Callable[[Any], T]) -> T | None:
        """`act` with the store; None once that is gone."""
        store = self._store
        if store is None:
            return None
        try:
            return act(store)
        except RuntimeError:
            self._store = None
            return None


def lost_rank(lost: dict[int, Lost], seen: str, could_ask: bool = True) -> LostRankError:
    """The error of a rank that lost those ranks; `seen` says how it noticed, `could_ask` whether all were asked."""
    if not lost and not could_ask:
        return LostRankError(
            f"another rank is gone: {seen}; which one is not known, since the node that keeps the launcher's store "
            "cannot be reached"
        )
    if not lost:
        return LostRankError(f"another rank is gone: {seen}; every rank still answers, so a connection broke")
    shown = [f"rank {rank} {known.what}" for rank, known in list(lost.items())[:8]]
    more = f", and {len(lost) - 8} more" if len(lost) > 8 else ""
    return LostRankError(f"lost {'; '.join(shown)}{more} ({seen})")


def this_place() -> dict[str, Any]:
    """Where this process is to be found: host, process id, and what says whether two share a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": f"{boot} {os.readlink('/proc/self/ns/pid')}",
    }
