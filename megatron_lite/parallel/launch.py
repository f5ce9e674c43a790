"""Starting a rank: what the launcher's environment says, the process group, threads, and signals.

The only place that reads environment variables of the launch. `deepspeed`, `torchrun` and a plain
`python` (one rank) all arrive here.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megatron_lite import log
from megatron_lite.errors import ConfigError, LaunchError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 25.0
"""What a save may take once the launcher is told to stop: `deepspeed` and `torchrun` kill ranks after 30 s."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """This rank among all ranks, as the launcher's environment states it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None

    @staticmethod
    def from_environment() -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR; absent is one rank.

        Raises ConfigError when only a part of them is there.
        """
        if "RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Launch()
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"the environment names a rank but not {', '.join(missing)}; "
                f"start with `deepspeed`, `torchrun` or plain `python`, or unset RANK and WORLD_SIZE"
            )
        world_size = int(os.environ["WORLD_SIZE"])
        return Launch(
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))),
            master_addr=os.environ["MASTER_ADDR"],
        )

    @property
    def is_local(self) -> bool:
        """All ranks are on this machine and talk over loopback."""
        return self.master_addr is None or self.master_addr in LOOPBACK


def likely_device() -> str:
    """ "cuda" on a machine with an NVIDIA GPU that ranks would be given, else "cpu". Without torch, at once."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    found = any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))
    return "cuda" if found and not hidden else "cpu"


def start(launch: Launch, timeout_minutes: float):
    """The device of this rank, its process group started, its threads shared out.

    Returns a torch.device: this rank's GPU (nccl), or the CPU (gloo). One rank alone gets a group
    too, over an in-process store: DeepSpeed wants one.
    """
    import torch
    import torch.distributed as dist

    log.configure(launch.rank, launch.world_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        if launch.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {launch.local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
                f"start at most that many ranks a node"
            )
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if launch.is_local:
        # Loopback only: without it gloo may listen on every interface of the machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(minutes=timeout_minutes)
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        try:
            dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        except dist.DistNetworkError as error:
            raise LaunchError(
                f"the ranks cannot meet at {launch.master_addr}:{os.environ['MASTER_PORT']} "
                f"({str(error).splitlines()[0]}); if another job on this machine has the port, start with "
                f"--master_port and another one (both `deepspeed` and `torchrun` take it)"
            ) from None
    return device


class StopRequest:
    """Whether this rank was asked to stop: by SIGTERM or SIGINT, or by the death of its launcher.

    A signal asks; a second SIGINT, seconds later, ends the process at once. `grace_seconds` is how long the
    process has from then on; None: `GRACE_SECONDS` under a launcher, which kills, and for ever without one.
    """

    def __init__(self, grace_seconds: float | None = None) -> None:
        self.reason: str | None = None
        self.asked_at: float | None = None
        self._grace_seconds = grace_seconds
        self._pressing = False
        self._watch_over = threading.Event()

    def listen(self) -> None:
        """Install the signal handlers and watch the launcher. Call from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        watched = _launcher_chain()
        if watched:
            if self._grace_seconds is None:
                self._grace_seconds = GRACE_SECONDS
            threading.Thread(target=self._watch, args=(watched,), daemon=True, name="launcher-watch").start()

    def deadline(self) -> float | None:
        """When a save on the way out must be over, on the monotonic clock; None if nobody presses."""
        if self.asked_at is None or self._grace_seconds is None or not self._pressing:
            return None
        return self.asked_at + self._grace_seconds

    def close(self) -> None:
        """Stop watching and give the signals their default meaning back."""
        self._watch_over.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def ask(self, reason: str, pressing: bool = False) -> None:
        """Note a reason to stop; the first one counts. `pressing`: the process may be killed soon."""
        if self.reason is None:
            self.asked_at = time.monotonic()
            self.reason = reason
        self._pressing |= pressing

    def _on_signal(self, number: int, frame) -> None:
        # Launchers pass a signal on that the group has had already, so a repeat alone means nothing;
        # but a second Ctrl-C from somebody who waits is to be obeyed.
        impatient = number == signal.SIGINT and self.asked_at and time.monotonic() - self.asked_at > 2.0
        self.ask(f"signal {signal.Signals(number).name}", pressing=True)
        if impatient:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _watch(self, chain: list[tuple[int, int]]) -> None:
        while not self._watch_over.wait(0.5):
            if any(_parent_of(pid) != parent for pid, parent in chain):
                self.ask("the launcher is gone", pressing=True)
                return


def command_line(argv: Sequence[str]) -> str:
    """The command this rank was started with, to be given again: its launcher's, where there is one.

    `argv` is that of the script, its path first.
    """
    chain = _launcher_chain()
    words = _words_of(chain[-1][1]) if chain else []
    if not words or "deepspeed.launcher.launch" in words:
        # On a node that `deepspeed` reached by ssh its own command line is not to be seen.
        return shlex.join(["python", *argv])
    if Path(words[0]).name.startswith("python"):
        is_module = words[1].startswith("-")
        words = ["python", *words[1:]] if is_module else [Path(words[1]).name, *words[2:]]
    return shlex.join(words)


def _launcher_chain() -> list[tuple[int, int]]:
    """Pairs (process, its parent) that must stay as they are while the launcher lives.

    `deepspeed` is two processes above a rank: its launch.py and the command the user started, which
    is the one a SIGTERM ends first. A shell above the launcher is not watched: it may go.
    """
    me, parent = os.getpid(), os.getppid()
    command = _command_of(parent)
    if not any(word in command for word in ("deepspeed", "torchrun", "torch.distributed", "torch/distributed")):
        return []
    chain = [(me, parent)]
    grandparent = _parent_of(parent)
    if "launcher" in command and grandparent and "deepspeed" in _command_of(grandparent):
        chain.append((parent, grandparent))
    return chain


def _parent_of(pid: int) -> int | None:
    try:
        # The name, in parentheses, may hold spaces: the fields are counted after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_of(pid: int) -> str:
    return " ".join(_words_of(pid))


def _words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
