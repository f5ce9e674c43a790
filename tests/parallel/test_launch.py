"""What launchers say of a rank, which of them are above it, and how long a save may take once they stop."""

import os
import signal
import socket
import time

import psutil
import pytest

from megatron_lite.errors import ConfigError, LaunchError
from megatron_lite.parallel import launch, launcher
from megatron_lite.parallel.launch import GRACE_SECONDS, Launch, StopRequest, first_host, tasks_per_node


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("under_a_launcher", "given", "expected"),
    [(False, None, None), (True, None, GRACE_SECONDS), (False, 100.0, 100.0), (True, 7.0, 7.0)],
)
def test_a_save_is_pressed_where_somebody_kills(under_a_launcher, given, expected, monkeypatch):
    chain = [(os.getpid(), os.getppid())] if under_a_launcher else []
    monkeypatch.setattr(launch, "launcher_chain", lambda: chain)
    stop = StopRequest(given)
    stop.listen()
    try:
        assert stop.deadline() is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "signal SIGTERM"
        left = stop.deadline() and stop.deadline() - time.monotonic()
        assert left == (expected and pytest.approx(expected, abs=5.0))
    finally:
        stop.close()


def test_a_stop_by_the_clock_does_not_press():
    stop = StopRequest(1.0)
    stop.ask("exit duration")
    assert stop.reason == "exit duration" and stop.deadline() is None


MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    **MEETING,
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", **MEETING}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "12345",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment of a rank, without what this process may have of one itself."""

    def become(variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_", "MASTER_", "LOCAL_", "TORCHELASTIC_")):
                monkeypatch.delenv(name)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.mark.parametrize(
    "variables",
    [
        TORCHRUN,
        {**TORCHRUN, "LOCAL_SIZE": TORCHRUN["LOCAL_WORLD_SIZE"]},
        OPEN_MPI,
        MPICH,
        {**SRUN, **MEETING},
        # Slurm's PMI-2 plugin.
        {**SRUN, **MEETING, "PMI_RANK": "5", "PMI_SIZE": "8"},
        # One launcher within another: the inner one's word holds.
        {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI},
        {**SRUN, "SLURM_PROCID": "1", **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", **TORCHRUN},
    ],
)
def test_every_launcher_says_the_same(variables, environment):
    environment(variables)
    assert Launch.from_environment() == Launch(5, 8, 1, 4, "node1", 29500)


def test_a_slurm_step_meets_on_its_first_node(environment):
    environment(SRUN)
    assert Launch.from_environment() == Launch(5, 8, 1, 4, "node1", 22345)
    environment({**SRUN, "SLURM_STEP_ID": "1"})
    assert Launch.from_environment().master_port == 22352
    # A batch script has a rank too, and one task is one rank.
    for alone in (
        {name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ):
        environment(alone)
        assert Launch.from_environment() == Launch()
    assert [first_host(nodes) for nodes in ("gpu[07-09,12],login", "a,b", "r[1-2]n[03,4]")] == ["gpu07", "a", "r1n03"]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8] and tasks_per_node("") == []


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 but not RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8 but not OMPI_COMM_WORLD_RANK"),
        ({"RANK": "1"}, "RANK but not WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8, but WORLD_SIZE=8"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one', which is to be a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK=4, but LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "rank 5 of 8 (deepspeed or torchrun) but not MASTER_PORT"),
        ({name: OPEN_MPI[name] for name in OPEN_MPI if name not in MEETING}, "not MASTER_ADDR and MASTER_PORT"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "LOCAL_RANK"}, "LOCAL_WORLD_SIZE but not LOCAL_RANK"),
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST"),
    ],
)
def test_an_environment_that_is_half_set_is_refused(variables, text, environment):
    environment(variables)
    with pytest.raises(ConfigError) as refused:
        Launch.from_environment()
    assert text in str(refused.value)


def test_ranks_of_one_machine_meet_on_loopback_alone():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port} .*in use.*MASTER_PORT"):
            launch.open_store(Launch(0, 2, 0, 2, "node1", port), 1)
    store = launch.open_store(Launch(0, 2, 0, 2, "node1", port), 1)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert [connection.laddr.ip for connection in listening] == ["127.0.0.1"]
    launch.open_store(Launch(1, 2, 1, 2, "node1", port), 1).set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize(
    ("above", "links"),
    [
        (["python -u -m deepspeed.launcher.launch --x", "python /env/bin/deepspeed --num_gpus 2 a.py", "bash"], 2),
        (["python /env/bin/torchrun a.py", "bash -c torchrun a.py"], 1),
        (["python3.11 -m torch.distributed.run a.py", "bash"], 1),
        (["orted -mca ess env", "sshd: me@notty", "sshd: me [priv]", "/usr/sbin/sshd -D"], 3),
        (["bash -c exec python a.py", "python -m deepspeed.launcher.launch", "bash", "sshd: me@notty"], 4),
        (["slurmstepd: [12.0]"], 1),
        (["appinit", "slurmstepd: [12.0]"], 2),
        (["bash", "sshd: me@pts/0", "/usr/sbin/sshd -D"], 0),
        (["bash run_deepspeed.sh"], 0),
    ],
)
def test_the_processes_up_to_the_launcher_are_watched(above, links, monkeypatch):
    me = os.getpid()
    parents = dict(zip([me, *range(10**7, 10**7 + len(above))], [*range(10**7, 10**7 + len(above)), 1], strict=True))
    split = {10**7 + number: [line] if ": " in line else line.split(" ") for number, line in enumerate(above)}
    monkeypatch.setattr(launcher, "parent_of", parents.get)
    monkeypatch.setattr(launcher, "_words_of", split.get)
    assert launcher.launcher_chain() == list(parents.items())[:links]
