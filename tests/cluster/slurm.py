"""Slurm's own daemons on two nodes of `nodes.py`: a controller on the first, and one for each node."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.nodes import Node, wait_for

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

_SETTINGS = """
ClusterName=two
SlurmctldHost={first.name}({first.address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2,sched_min_interval=0
ReturnToService=2
MpiDefault=none
KillWait=10
"""


class Slurm:
    """A cluster that takes jobs from its first node."""

    def __init__(self, folder: Path, first: Node):
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._first = first

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints on the first node."""
        command = ["env", *(f"{name}={value}" for name, value in self.environment.items()), *words]
        done = subprocess.run(self._first.command(*command), capture_output=True, text=True, timeout=240)
        return done.stdout + done.stderr

    def state_of(self, job: str) -> str:
        """A job's state, as PENDING or FAILED."""
        return self.ask("scontrol", "show", "job", job).partition("JobState=")[2].partition(" ")[0]


@contextlib.contextmanager
def cluster(nodes: tuple[Node, Node]) -> Iterator[Slurm]:
    """The daemons, ended with all they run at the end."""
    # munge will have a socket's path short, and each folder above it its owner's.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        listed = [f"NodeName={node.name} NodeAddr={node.address} CPUs=1 State=UNKNOWN" for node in nodes]
        names = ",".join(node.name for node in nodes)
        settings = _SETTINGS.format(folder=folder, first=nodes[0])
        (folder / "slurm.conf").write_text(
            "\n".join([settings, *listed, f"PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP\n"])
        )
        slurm = Slurm(folder, nodes[0])
        munge = [
            f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
        ]
        daemons = [(nodes[0], ["munged", "--foreground", "--force", f"--log-file={folder}/munge.log", *munge])]
        daemons += [(nodes[0], ["slurmctld", "-D", "-f", folder / "slurm.conf"])]
        daemons += [(node, ["slurmd", "-D", "-f", folder / "slurm.conf", "-N", node.name]) for node in nodes]
        for number, (node, words) in enumerate(daemons):
            output = held.enter_context((folder / f"daemon-{number}").open("w"))
            command = node.command("setpriv", "--pdeathsig", "KILL", *words)
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            held.callback(_end, daemon)
            if words[0] == "munged":
                wait_for((folder / "munge.socket").exists, 80, "munged", (folder / "daemon-0").read_text)

        def said() -> str:
            return "\n".join((folder / f"daemon-{number}").read_text()[-2000:] for number in range(len(daemons)))

        wait_for(
            lambda: "idle" in slurm.ask("sinfo", "--noheader", "--states=idle", "--nodes", names), 240, "Slurm", said
        )
        wait_for(lambda: slurm.ask("sinfo", "-h", "-N", "-t", "idle").count("\n") == 2, 240, "both nodes", said)
        yield slurm


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
