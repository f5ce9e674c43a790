"""The launcher of a rank, as the processes above it; and how a tool starts ranks on this machine by itself."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lite import log
from megatron_lite.credentials import without_credentials
from megatron_lite.errors import ConfigError

#: Programs that start ranks, by their file names or as Python's modules. A name ends at a colon: "slurmstepd: [12.0]".
_PROGRAMS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy"}
_PROGRAMS |= {"mpirun.openmpi", "mpiexec.openmpi", "mpiexec.hydra", "slurmstepd"}
_MODULES = {"torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch"}
_MODULES |= {"deepspeed.launcher.runner"}
#: What another node's launcher reached this one by; not the daemon that listens, which may be restarted.
_SESSION = re.compile(r"sshd(-session)?: [^/]")


def launcher_chain() -> list[tuple[int, int]]:
    """Pairs (process, its parent), from this process upwards, that stay as they are while the launcher lives.

    `deepspeed` is two processes above a rank, its launch.py and the command the user started, and another node's is
    at the far end of an `sshd`. Shells and containers in between belong to it; a shell above it does not: it may go.
    Empty without a launcher.
    """
    chain: list[tuple[int, int]] = []
    links, process = 0, os.getpid()
    while (parent := parent_of(process)) and parent > 1:
        chain.append((process, parent))
        words = _words_of(parent)
        if _is_launcher(words) or (links and words and _SESSION.match(words[0])):
            links = len(chain)
        process = parent
    return chain[:links]


def command_line(argv: Sequence[str]) -> str:
    """The command this rank was started with, without credentials: its launcher's, where there is one.

    `argv` is that of the script, its path first.
    """
    chain = launcher_chain()
    words = next((words for _, pid in reversed(chain) if _is_launcher(words := _words_of(pid))), [])
    if not words or "deepspeed.launcher.launch" in words or _name(words[0]) in ("orted", "prted", "slurmstepd"):
        # On a node that a launcher reached from another its own command line is not to be seen.
        words = ["python", *argv]
    elif Path(words[0]).name.startswith("python"):
        is_module = words[1].startswith("-")
        words = ["python", *words[1:]] if is_module else [Path(words[1]).name, *words[2:]]
    return shlex.join(map(without_credentials, words))


def start_command(ranks: int, *, on_gpus: bool) -> list[str]:
    """The words before a script's own that start so many processes of it on this machine, which share its cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    words = ["env", f"OMP_NUM_THREADS={threads}", *([] if on_gpus else ["CUDA_VISIBLE_DEVICES="]), sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return words


def takes_gpus(device: str | None, ranks: int) -> bool:
    """Whether ranks started here run on GPUs: as `device` says, by default where there is one for each.

    Raises ConfigError where "cuda" is asked for and there are fewer.
    """
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < ranks:
        raise ConfigError(f"{ranks} processes are to run on {gpus} GPUs; give --device cpu")
    if device is None and 0 < gpus < ranks:
        log.warn(f"{ranks} processes run on the CPU, since there are {gpus} GPUs")
    return device == "cuda" or (device is None and gpus >= ranks)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they did, while they live."""
    parents = {
        int(entry.name): parent_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()
    }
    found, below = [], [pid]
    while below:
        below = [child for child, parent in parents.items() if parent in below]
        found += below
    return found


def parent_of(pid: int) -> int | None:
    """The parent of a process; None if there is no such process."""
    try:
        # The name, in parentheses, may hold spaces: the fields are counted after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line is a launcher's: its program, or the module or script that Python runs."""
    if not words or not Path(words[0]).name.startswith("python"):
        return bool(words) and _name(words[0]) in _PROGRAMS
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words[:4] else []
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    return bool(_MODULES.intersection(module)) or _name(script) in _PROGRAMS or script.endswith("distributed/run.py")


def _name(word: str) -> str:
    return Path(word.partition(":")[0]).name


def _words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
