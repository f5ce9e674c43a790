"""Starting a rank: what the launcher's environment says, the process group, threads, and signals.

The only place that reads environment variables of the launch. `deepspeed`, `torchrun`, `mpirun`, `srun` and a plain
`python` (one rank) all arrive here.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

from megatron_lite import log
from megatron_lite.errors import EXIT_HANG, EXIT_LOST_RANK, ConfigError, LaunchError
from megatron_lite.parallel.launcher import launcher_chain, parent_of

_INTERNET = (socket.AF_INET, socket.AF_INET6)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 25.0
"""What a save may take once the launcher is told to stop: `deepspeed` and `torchrun` kill ranks after 30 s."""


class _Names(NamedTuple):
    """What one kind of launcher calls a rank and its place; each local name may have alternatives."""

    launcher: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


#: The first whose rank is there is believed: `srun torchrun` and `srun mpirun` leave Slurm's names behind theirs.
_LAUNCHERS = (
    _Names("deepspeed or torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Names(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Names(
        "mpirun",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """This rank among all ranks, as the launcher's environment states it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    store_is_there: bool = False
    """`torchrun` keeps the store at the master's address; elsewhere rank 0 does."""
    attempt: int = 0
    """How often `torchrun` has started the ranks again: its store remembers what earlier ones wrote."""

    @staticmethod
    def from_environment() -> Launch:
        """Read what `deepspeed`, `torchrun`, `mpirun` or `srun` say of a rank; nothing said is one rank.

        Raises ConfigError when only a part of it is there.
        """
        launchers = [names for names in _LAUNCHERS if not _are_slurms(names)]
        names = next((names for names in launchers if names.rank in os.environ), None)
        if names is not None:
            return _started_by(names)
        for names in launchers:
            if os.environ.get(names.world_size, "1") != "1":
                raise ConfigError(
                    f"the environment has {names.world_size}={os.environ[names.world_size]} but not {names.rank}; "
                    f"start with {names.launcher}, or unset {names.world_size}"
                )
        # A batch script has a SLURM_PROCID too, and is no task of a step.
        if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
            return _started_by_srun()
        return Launch()

    @property
    def is_local(self) -> bool:
        """All ranks are on this machine and talk over loopback."""
        return self.local_world_size == self.world_size or self.master_addr in LOOPBACK

    @property
    def meeting_place(self) -> str:
        """The address at which the ranks find one another."""
        return "127.0.0.1" if self.is_local and not self.store_is_there else self.master_addr


def _are_slurms(names: _Names) -> bool:
    """Whether it is Slurm that uses these names: its PMI-2 plugin gives tasks mpirun's, but no place on a node."""
    a_step = "PMI_RANK" in os.environ and "SLURM_STEP_ID" in os.environ
    return a_step and names.rank == "PMI_RANK" and not any(name in os.environ for name in names.local_rank)


def _started_by(names: _Names) -> Launch:
    world_size = _number(names.world_size, names, least=1)
    rank = _number(names.rank, names)
    if rank >= world_size:
        raise ConfigError(f"the environment has {names.rank}={rank}, but {names.world_size}={world_size}")
    if world_size == 1:
        return Launch()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"the environment names rank {rank} of {world_size} ({names.launcher}) but not {' and '.join(missing)}, "
            f"where the ranks find one another: the address of the first node, and a free port of it; "
            f"examples/cluster/ has scripts that set them"
        )
    local_rank = next((name for name in names.local_rank if name in os.environ), None)
    local_size = next((name for name in names.local_world_size if name in os.environ), None)
    if (local_rank is None) != (local_size is None):
        there, absent = (local_rank, names.local_world_size) if local_rank else (local_size, names.local_rank)
        raise ConfigError(
            f"the environment has {there} but not {absent[0]}: how many ranks this node has, and which of them this "
            f"is, go together; set both, or neither for one rank a node"
        )
    launch = Launch(
        rank=rank,
        world_size=world_size,
        local_rank=_number(local_rank, names) if local_rank else 0,
        local_world_size=_number(local_size, names, least=1) if local_size else 1,
        master_addr=os.environ["MASTER_ADDR"],
        master_port=_number("MASTER_PORT", names, least=1),
        store_is_there=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    if launch.local_rank >= launch.local_world_size:
        raise ConfigError(
            f"the environment has {local_rank}={launch.local_rank}, but {local_size}={launch.local_world_size}"
        )
    return launch


def _number(name: str, names: _Names, least: int = 0) -> int:
    if name not in os.environ:
        raise ConfigError(
            f"the environment has {names.rank} but not {name}; start with {names.launcher} or plain `python`, "
            f"or unset {names.rank}"
        )
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"the environment has {name}={text!r}, which is to be a whole number of at least {least}")
    return int(text)


def _started_by_srun() -> Launch:
    """A task of a Slurm step. Without MASTER_ADDR and MASTER_PORT ranks meet on the step's first node, at a port made
    of the job's and the step's number."""
    names = _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", (), ())
    world_size = _number(names.world_size, names, least=1)
    if world_size == 1:
        return Launch()
    node = _number("SLURM_NODEID", names)
    local_sizes = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if node >= len(local_sizes) or not nodes:
        raise ConfigError(
            "the environment has SLURM_PROCID but neither SLURM_STEP_NODELIST nor SLURM_STEP_TASKS_PER_NODE for this "
            "node; start with srun, or unset SLURM_PROCID"
        )
    step = _number("SLURM_JOB_ID", names) + 7 * _number("SLURM_STEP_ID", names)
    port = os.environ.get("MASTER_PORT") or str(20000 + step % 10000)
    return Launch(
        rank=_number(names.rank, names),
        world_size=world_size,
        local_rank=_number("SLURM_LOCALID", names),
        local_world_size=local_sizes[node],
        master_addr=os.environ.get("MASTER_ADDR") or first_host(nodes),
        master_port=int(port),
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's shorthand written out: "2(x3),1" is [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: "gpu[07-09,12],login" begins with gpu07."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])


def likely_device() -> str:
    """ "cuda" on a machine with an NVIDIA GPU that ranks would be given, else "cpu". Without torch, at once."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    found = any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))
    return "cuda" if found and not hidden else "cpu"


def open_store(launch: Launch, timeout_minutes: float):
    """The torch.distributed store through which the ranks find one another. Raises LaunchError.

    Rank 0 keeps it, on loopback alone where all ranks are on this machine; or `torchrun` does.
    """
    import torch.distributed as dist

    if launch.world_size == 1:
        return dist.HashStore()
    keeps = launch.rank == 0 and not launch.store_is_there
    place, port = launch.meeting_place, launch.master_port
    try:
        # Torch itself would listen on every interface of the machine.
        listening = socket.create_server((place, port), backlog=4096) if keeps and launch.is_local else None
        store = dist.TCPStore(
            place,
            port,
            launch.world_size,
            is_master=keeps,
            timeout=timedelta(minutes=timeout_minutes),
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise LaunchError(
            f"the ranks cannot meet at {place}:{port} ({str(error).splitlines()[0]}); if another job has the port, "
            f"start with another one: --master_port for `deepspeed` and `torchrun`, MASTER_PORT for `mpirun` and `srun`"
        ) from None
    return dist.PrefixStore(f"attempt {launch.attempt}", store)


def start(launch: Launch, timeout_minutes: float, store=None):
    """The device of this rank, its process group started, its threads shared out.

    `store` is that of `open_store`, if it is open already. Returns a torch.device: this rank's GPU (nccl), or the
    CPU (gloo). One rank alone gets a group too, over an in-process store: DeepSpeed wants one.
    """
    import torch
    import torch.distributed as dist

    from megatron_lite.parallel.process_mesh import group_timeout

    log.configure(launch.rank, launch.world_size)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    if torch.cuda.is_available():
        # Slurm may show each task its own GPU alone.
        alone = torch.cuda.device_count() == 1 and launch.local_world_size > 1 and "SLURM_STEP_ID" in os.environ
        device = torch.device("cuda", 0 if alone else launch.local_rank)
        if device.index >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {launch.local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
                f"start at most that many ranks a node"
            )
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    _choose_interface(launch)
    if launch.world_size > 1:
        _tell_libraries(launch)
    dist.init_process_group(
        backend,
        store=open_store(launch, timeout_minutes) if store is None else store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=group_timeout(device, timedelta(minutes=timeout_minutes)),
    )
    return device


def _tell_libraries(launch: Launch) -> None:
    """Leave for DeepSpeed the names that `torchrun` uses, whatever launcher it was."""
    for name, value in (
        ("RANK", launch.rank),
        ("WORLD_SIZE", launch.world_size),
        ("LOCAL_RANK", launch.local_rank),
        ("LOCAL_WORLD_SIZE", launch.local_world_size),
    ):
        os.environ[name] = str(value)


def _choose_interface(launch: Launch) -> None:
    """Let the ranks of one machine talk over loopback, and those of several over the interface towards the first.

    Left alone, gloo listens where the machine's name leads, which on many is 127.0.1.1 and no way to other nodes.
    """
    if launch.is_local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    elif "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(launch.master_addr)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return
        elsewhere = launch.world_size - launch.local_world_size
        log.every_rank(
            f"warning: no interface of this machine is seen to lead to {launch.master_addr}, where the ranks are to "
            f"meet, though {elsewhere} of {launch.world_size} are elsewhere; if they do not find one another, give an "
            f"address of the network between the nodes, or name its interface in GLOO_SOCKET_IFNAME"
        )


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host`; None if none is seen to.

    Where `host` is this machine by a loopback address, as its own name often is, it is the only other interface.
    """
    import psutil

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    towards = ipaddress.ip_address(own.partition("%")[0])
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = {
        name: [ipaddress.ip_address(a.address.partition("%")[0]) for a in held if a.family in _INTERNET]
        for name, held in psutil.net_if_addrs().items()
        if name in up
    }
    if not towards.is_loopback:
        found = [name for name, held in addresses.items() if towards in held]
    else:
        found = [name for name, held in addresses.items() if held and not any(a.is_loopback for a in held)]
    return found[0] if len(found) == 1 else None


def end_process(code: int) -> NoReturn:
    """End with that exit code: at once where other ranks hang or are gone, whose groups a tidy end would wait for."""
    if code in (EXIT_HANG, EXIT_LOST_RANK):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def watch_launcher(gone: Callable[[], object], over: threading.Event) -> bool:
    """Whether this rank has a launcher; a thread calls `gone` once it has one no more, unless it is `over` before."""
    chain = launcher_chain()

    def watch() -> None:
        while not over.wait(0.5):
            if any(parent_of(pid) != parent for pid, parent in chain):
                gone()
                return

    if chain:
        threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
    return bool(chain)


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
        if watch_launcher(lambda: self.ask("the launcher is gone", pressing=True), self._watch_over):
            self._grace_seconds = GRACE_SECONDS if self._grace_seconds is None else self._grace_seconds

    def deadline(self) -> float | None:
        """When a save on the way out must be over, on the monotonic clock; None if nobody presses."""
        if self.asked_at is None or self._grace_seconds is None or not self._pressing:
            return None
        return self.asked_at + self._grace_seconds

    def close(self) -> None:
        """Stop watching and give the signals their default meaning back.

        After one that was heeded SIGTERM has none: a repeat would turn a good end into a bad one.
        """
        self._watch_over.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self._pressing else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

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
