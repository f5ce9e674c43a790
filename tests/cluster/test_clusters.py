"""Two nodes under each launcher: they train as one node does, and whoever dies ends all of them, who say who it was."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster.jobs import FOR_EVER, MODEL, PYTHON, ROOT, SCRIPTS, Job, start
from cluster.nodes import Node, wait_for

from megatron_lite.checkpoint.manifest import read_manifest

Nodes = tuple[Node, Node]
SECRET = "KanarienVogel"
"""In the environment that `deepspeed` carries to other nodes, by its names and by its file."""


def by_deepspeed(nodes: Nodes, folder: Path) -> Job:
    folder.mkdir()
    (folder / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    (folder / ".deepspeed_env").write_text(f"OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHUB_TOKEN={SECRET}\n")
    return start(
        ["bash", SCRIPTS / "deepspeed_hostfile.sh", *MODEL, *FOR_EVER, "--save", "run"],
        folder,
        on=nodes[0],
        MLFLOW_TRACKING_TOKEN=SECRET,
    )


def by_torchrun(nodes: Nodes, folder: Path) -> Job:
    is_static = "static" in folder.name
    for rank, node in reversed(list(enumerate(nodes))):
        job = start(
            ["bash", SCRIPTS / "torchrun_nodes.sh", *MODEL, *FOR_EVER, "--save", "run"],
            folder,
            on=node,
            NODES="2",
            RANKS="1",
            MASTER_ADDR=nodes[0].address if is_static else nodes[0].name,
            **({"NODE_RANK": str(rank)} if is_static else {}),
        )
    return job


def by_mpirun(nodes: Nodes, folder: Path) -> Job:
    return start(
        ["bash", SCRIPTS / "mpirun.sh", *MODEL, *FOR_EVER, "--save", "run"],
        folder,
        on=nodes[0],
        HOSTS="node-a:1,node-b:1",
        STOP_SECONDS="5",
        MPIRUN_OPTIONS="--allow-run-as-root",
    )


def the_one(found: list[psutil.Process]) -> psutil.Process:
    assert len(found) == 1, found
    return found[0]


def deepspeed_of(nodes: Nodes) -> psutil.Process:
    """The command that the user started."""
    found = [process for process in nodes[0].processes() if str(PYTHON.parent / "deepspeed") in process.cmdline()]
    return the_one(found)


def gone_from(nodes: Nodes) -> None:
    """All that was started is gone from both nodes: processes, and sockets that listen."""

    def left() -> list[str]:
        found = []
        for node in nodes:
            for process in node.processes():
                try:
                    if process.pid != node.sshd.pid and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(f"{node.name}: {process.pid} {' '.join(process.cmdline())[:200]}")
                except psutil.NoSuchProcess:
                    continue
            found += [line for line in node.listening().splitlines() if "sshd" not in line]
        return found

    wait_for(lambda: not left(), 180, "the end of everything", lambda: "\n".join(left()))


LOST, STOPPED = "lost_rank", "the_launcher_is_gone"
CASES: dict[str, tuple[Callable[[Nodes, Path], Job], Callable[[Nodes, Job], psutil.Process], str]] = {
    "deepspeed, a rank": (by_deepspeed, lambda nodes, job: the_one(nodes[1].ranks()), LOST),
    "deepspeed, a node's launcher": (by_deepspeed, lambda nodes, job: the_one(nodes[1].ranks()).parent(), STOPPED),
    "deepspeed, itself": (by_deepspeed, lambda nodes, job: deepspeed_of(nodes), STOPPED),
    "torchrun static, a rank": (by_torchrun, lambda nodes, job: the_one(nodes[0].ranks()), LOST),
    "torchrun c10d, a node's launcher": (
        by_torchrun,
        lambda nodes, job: the_one(nodes[1].ranks()).parent(),
        STOPPED,
    ),
    "mpirun, a rank": (by_mpirun, lambda nodes, job: the_one(nodes[1].ranks()), LOST),
    "mpirun, a node's launcher": (by_mpirun, lambda nodes, job: the_one(nodes[1].ranks()).parent(), STOPPED),
    "mpirun, itself": (by_mpirun, lambda nodes, job: the_one(nodes[0].ranks()).parent(), STOPPED),
}


_PROGRAMS = {by_deepspeed: ("pdsh",), by_torchrun: (), by_mpirun: ("mpirun",)}


@pytest.mark.parametrize("case", CASES)
def test_two_nodes_train_as_one_and_end_together(case, needs, nodes, losses_of_one_node, tmp_path):
    begin, victim, cause = CASES[case]
    needs(*_PROGRAMS[begin])
    job = begin(nodes, tmp_path / case.partition(",")[0].replace(" ", "-"))
    assert job.first_losses() == losses_of_one_node
    ranks = [the_one(node.ranks()) for node in nodes]
    dead = victim(nodes, job)
    began = time.monotonic()
    dead.send_signal(signal.SIGKILL)
    told = job.told()
    if "torchrun" in case and cause == STOPPED:
        # torchrun's other agents wait 5 minutes for the one that is gone, all ranks having ended.
        wait_for(lambda: not any(node.ranks() for node in nodes), 180, "the ranks' end", job.said)
        job.launcher.kill()
    job.wait(240)
    gone_from(nodes)
    print(f"{case}: over in {time.monotonic() - began:.1f} s")
    logs = [job.run / "logs" / f"rank-0000{rank}.log" for rank in range(2)]
    if cause == LOST:
        number = ranks.index(dead)
        assert (told["cause"], told["code"]) == (LOST, 5), job.said()
        assert f"lost rank {number} on {nodes[number].name}: " in told["message"], job.said()
        assert "lost rank" in logs[1 - number].read_text()
    else:
        assert told["cause"] in (cause, "signal_SIGTERM") and told["code"] == 0, job.said()
        saved = read_manifest(job.run / (job.run / "latest").read_text().strip())
        assert saved.step == told["step"] == len(job.losses())
    console = job.output.read_text(errors="replace")
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "pretrain_gpt.py") not in console
    kept = [path for path in job.run.rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if SECRET.encode() in path.read_bytes()]
    for rank, log in enumerate(logs):
        assert log.read_text().startswith("=====") and f"rank {rank} of 2 on {nodes[rank].name}" in log.read_text()
