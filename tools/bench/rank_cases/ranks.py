"""Ranks on this machine for a benchmark: forked from a process that has imported the libraries, joined by gloo."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import distributed as dist

_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of Linux."""


def on_ranks(size: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `act(rank, *arguments)` gives on each of `size` ranks with a gloo process group, by way of JSON.

    Raises SystemExit with the log of a rank that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = {}
        for rank in range(size):
            if (process := os.fork()) == 0:
                _be_rank(rank, size, Path(folder), act, arguments)
            ranks[process] = rank
        failed = [rank for process, rank in ranks.items() if os.waitpid(process, 0)[1]]
        if failed:
            raise SystemExit(f"rank {failed[0]} of {size} failed\n{Path(folder, f'log-{failed[0]}').read_text()}")
        return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(size)]


def _be_rank(rank: int, size: int, folder: Path, act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    code = 1
    with contextlib.suppress(BaseException):
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size
            )
            found = act(rank, *arguments)
            # A rank that is gone looks like one that has crashed to those that still talk.
            dist.barrier()
            (folder / f"rank-{rank}.json").write_text(json.dumps(found))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
    # No farewell: what this process was forked from is not its to close.
    os._exit(code)


@contextlib.contextmanager
def link_of(megabits: float) -> Iterator[None]:
    """Ranks forked in here talk over a link of so many Mbit/s that all share, in a network of this process alone.

    The process stays in that network. Raises SystemExit where that needs rights which this user has not.
    """
    loopback = ("dev", "lo")
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise SystemExit(f"a slow link needs a network of its own, and root: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", *loopback, "up"], check=True)
    rate = ("rate", f"{megabits:g}mbit", "burst", "256kb", "latency", "10s")
    subprocess.run(["tc", "qdisc", "replace", *loopback, "root", "tbf", *rate], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", *loopback, "root"], check=True)


def write(path: Path, record: dict[str, Any]) -> None:
    """A benchmark's JSON, beside the device and the versions it was made with."""
    from megatron_lite.monitor.versions import versions

    device = f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, **record, "versions": versions()}, indent=1) + "\n")
