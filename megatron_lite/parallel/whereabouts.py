"""Where this process is, noted in passing and read when it no longer moves.

There is one of it in a process, as of the log: whatever acts notes what it is about to do, by a few assignments and
no lock, so that another thread can tell it while this one is stuck in a collective or on a GPU. Training is cut into
stretches (a step, a batch of a validation, a checkpoint), which all ranks go through in the same order.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

STEP, VALIDATION, CHECKPOINT = "training step", "batch of validation", "checkpoint"
RECENT = 50
"""Stretches of a kind whose times are remembered."""


class Stretch(NamedTuple):
    """A part of a run."""

    kind: str
    number: int
    place: int
    """How many stretches came before it: on all ranks the same."""
    began: float
    """On the monotonic clock, which stands still while the machine is suspended."""

    def __str__(self) -> str:
        return f"{self.kind} {self.number}" if self.number else self.kind


class Collective(NamedTuple):
    """Where a rank is among the collectives of a process group, by torch's flight recorder: in the first that is not
    over, or behind the last."""

    group: str
    """The group's name, the same on all its ranks."""
    over: str
    """The axes its ranks differ along, as "data+context"; another word for what is no group of the mesh."""
    name: str
    number: int
    """How many of this group there were, itself included: on all its ranks the same."""
    is_over: bool
    seconds: float = 0.0
    """How long it is under way."""

    def __str__(self) -> str:
        over = {"default_pg": "all", "undefined": "a group of DeepSpeed's"}.get(self.over, self.over)
        return f"{self.name} {self.number} over {over.replace('+', ' and ')}"


class Order(NamedTuple):
    """What is to come from one other rank."""

    rank: int
    since: float
    """When it was asked for, on the monotonic clock."""


class Whereabouts:
    """What this process is doing."""

    def __init__(self) -> None:
        self.stretch = Stretch("start", 0, 0, time.monotonic())
        self.doing: tuple[Any, ...] = ()
        """Words and numbers, put together only when somebody asks."""
        self.awaited: dict[tuple[Any, ...], Order] = {}
        """What was ordered from another rank and is not used yet, by words as of `doing`."""
        self.waited = 0.0
        """Seconds spent in collectives, as the host sees it: on a GPU, which works by itself, next to nothing."""
        self._computed = 0.0
        self._on_device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        """Seconds that the last stretches of each kind took."""

    def begin(self, kind: str, number: int = 0) -> None:
        """Come to the next stretch, which ends the one before."""
        last, now = self.stretch, time.monotonic()
        self.times[last.kind].append(now - last.began)
        self.doing = ()
        self.awaited.clear()
        self.stretch = Stretch(kind, number, last.place + 1, now)

    def note(self, *words: Any) -> None:
        """Say what comes next within a stretch."""
        self.doing = words

    def order(self, rank: int, *what: Any) -> None:
        """Say what is to come from another rank."""
        self.awaited[what] = Order(rank, time.monotonic())

    @contextlib.contextmanager
    def waiting(self, what: str = "", rank: int | None = None) -> Iterator[None]:
        """Within it this rank waits for others; for `what` of one `rank`, where that is known."""
        began = time.perf_counter()
        if rank is not None:
            self.order(rank, what)
        yield
        self.awaited.pop((what,), None)
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def computing(self, device: torch.device) -> Iterator[None]:
        """Within it this rank computes: what the host waits for others meanwhile is not counted.

        On a GPU it is the time of its stream, which waits for tensor and context ranks as well.
        """
        if device.type == "cpu":
            began, waited = time.perf_counter(), self.waited
            yield
            self._computed += time.perf_counter() - began - (self.waited - waited)
            return
        from torch.cuda import Event

        ends = Event(enable_timing=True), Event(enable_timing=True)
        ends[0].record()
        yield
        ends[1].record()
        self._on_device.append(ends)

    def take_computed(self) -> float:
        """Seconds of computing since the last call."""
        seconds, self._computed = self._computed, 0.0
        for began, ended in self._on_device:
            ended.synchronize()
            seconds += began.elapsed_time(ended) / 1000
        self._on_device.clear()
        return seconds


HERE = Whereabouts()


def collectives() -> list[Collective]:
    """Where this rank is among the collectives of each of its groups; nothing where torch keeps no record."""
    import torch._C._distributed_c10d as c10d

    found: dict[str, Collective] = {}
    for recorder in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if (dump := getattr(c10d, recorder, None)) is None:
            continue
        for entry in json.loads(dump()).get("entries", ()):
            if entry["is_p2p"]:
                continue
            group, over = entry["process_group"]
            if (last := found.get(group)) is None or last.is_over:
                name = entry["profiling_name"].rpartition(":")[2]
                is_over = entry["retired"] or entry["state"] == "completed"
                seconds = 0.0 if is_over else (time.time_ns() - entry["time_created_ns"]) / 1e9
                found[group] = Collective(group, over, name, entry["collective_seq_id"], is_over, round(seconds, 1))
    return list(found.values())


def longest_wait() -> tuple[str, float]:
    """What this rank has waited for longest of what is under way, in words, and for how many seconds."""
    waits = [(str(collective), collective.seconds) for collective in collectives() if not collective.is_over]
    for what, order in dict(HERE.awaited).items():
        waits.append((f"{' '.join(map(str, what))} from rank {order.rank}", time.monotonic() - order.since))
    return max(waits, key=lambda wait: wait[1], default=("nothing", 0.0))
