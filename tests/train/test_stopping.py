"""Stopping on request: a signal to the launcher or to everybody ends every rank, with the state saved."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.parallel.launch import LOOPBACK

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "pretrain_gpt.py")
MODEL = (
    "--mock-data --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 64 "
    "--eval-interval 0 --train-iters 1000000 --log-interval 1000 --tensorboard-dir none"
).split()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _command(launcher: str) -> list[str]:
    if launcher == "python":
        return [sys.executable, SCRIPT, "--zero-stage", "0"]
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", _free_port()]
        return [*run, SCRIPT, "--tensor-model-parallel-size", "2", "--zero-stage", "0"]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    run = [sys.executable, deepspeed, "--num_accelerators", "2", "--master_port", _free_port()]
    return [*run, SCRIPT, "--zero-stage", "1"]


def _start(launcher: str, folder: Path, *extra: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME"):
        environment.pop(name, None)
    with open(folder.parent / f"{folder.name}.log", "w") as output:
        return subprocess.Popen(
            [*_command(launcher), *MODEL, "--save", str(folder), *extra],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=ROOT,
        )


def _wait_for_steps(process: subprocess.Popen, folder: Path, steps: int = 3) -> None:
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        log = (folder.parent / f"{folder.name}.log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, log
        time.sleep(0.1)


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    """The launcher and all that came of it; torchrun puts its ranks in sessions of their own."""
    launcher = psutil.Process(process.pid)
    return [launcher, *launcher.children(recursive=True)]


def _reachable_by_others(family: list[psutil.Process]) -> dict[int, list[str]]:
    """By process, the addresses besides loopback at which it listens."""
    listening = {p.pid: [c.laddr.ip for c in p.net_connections("inet") if c.status == "LISTEN"] for p in family}
    assert any(listening.values())
    return {pid: open_ for pid, ips in listening.items() if (open_ := [ip for ip in ips if ip not in LOOPBACK])}


def _wait_until_gone(family: list[psutil.Process], seconds: float) -> None:
    def still() -> list[psutil.Process]:
        return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + seconds
    while left := still():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _kill(family: list[psutil.Process]) -> None:
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


@pytest.mark.parametrize(
    ("launcher", "whom"),
    [
        ("python", "launcher"),
        ("torchrun", "launcher"),
        ("torchrun", "group"),
        ("deepspeed", "launcher"),
        ("deepspeed", "group"),
    ],
)
def test_sigterm_saves_and_leaves_nobody(launcher, whom, tmp_path):
    folder = tmp_path / "run"
    process = _start(launcher, folder)
    _wait_for_steps(process, folder)
    family = _family(process)
    assert len(family) >= (1 if launcher == "python" else 3)
    try:
        # The store of torchrun's own agent is open to all; what ranks listen at is not.
        assert _reachable_by_others(family).keys() <= ({process.pid} if launcher == "torchrun" else set())
        if whom == "launcher":
            os.kill(process.pid, signal.SIGTERM)
        else:
            # Twice, as where a cluster's manager and the launcher both pass it on.
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        process.wait(40)
        _wait_until_gone(family, 40)
    finally:
        _kill(family)
    log = (tmp_path / "run.log").read_text()
    told = json.loads((folder / "exit.json").read_text())
    assert told["code"] == 0 and told["cause"] in ("signal_SIGTERM", "the_launcher_is_gone"), log
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = (folder / "latest").read_text().strip()
    assert told["step"] == logged[-1] == read_manifest(folder / saved).step, log
    assert f"goes on from step {told['step']}" in told["how_to_go_on"]
    command = told["how_to_go_on"].partition(": ")[2].split()
    assert command[0] == ("deepspeed" if launcher == "deepspeed" else "python"), told
    assert command[-2:] == ["--save", str(folder)] and not any("local_rank" in word for word in command)
    assert launcher == "python" or "2" in command[: command.index(SCRIPT)], "the number of ranks is told"
    if launcher == "python":
        assert process.returncode == 0 and "[WARNING]" not in log, log


def test_sigint_and_time_limit_stop_as_well(tmp_path):
    folder = tmp_path / "run"
    process = _start("python", folder)
    _wait_for_steps(process, folder)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 0
    assert json.loads((folder / "exit.json").read_text())["cause"] == "signal_SIGINT"
    process = _start("python", folder, "--exit-duration-in-mins", "0.001")
    assert process.wait(60) == 0
    assert json.loads((folder / "exit.json").read_text())["cause"] == "exit_duration"


def test_a_validation_does_not_keep_a_stop_waiting(tmp_path):
    folder = tmp_path / "run"
    process = _start("python", folder, "--eval-interval", "3", "--eval-iters", "1000000", "--global-batch-size", "8")
    _wait_for_steps(process, folder)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0
    assert json.loads((folder / "exit.json").read_text())["step"] == 3
    assert "the validation after step 3 is broken off" in (tmp_path / "run.log").read_text()
    assert read_manifest(folder / "step-00000003").step == 3


def test_lost_rank_ends_the_others(tmp_path):
    """A rank that is killed ends the job, not in a hang, and what was saved stays."""
    folder = tmp_path / "run"
    process = _start("torchrun", folder, "--save-interval", "2", "--keep-last", "2")
    _wait_for_steps(process, folder, steps=6)
    family = _family(process)
    try:
        next(p for p in family if SCRIPT in p.cmdline() and p.environ().get("RANK") == "1").kill()
        process.wait(60)
        _wait_until_gone(family, 40)
    finally:
        _kill(family)
    log = (tmp_path / "run.log").read_text()
    assert process.returncode != 0 and "another rank is gone" in log, log
    told = json.loads((folder / "exit.json").read_text())
    assert told["cause"] == "lost_rank" and told["code"] == 5
    saved = read_manifest(folder / (folder / "latest").read_text().strip())
    assert saved.step >= 2 and f"goes on from step {saved.step}" in told["how_to_go_on"]


def test_user_error_exits_2_without_traceback(tmp_path):
    for arguments, text in (
        (["--num-attention-heads", "3"], "does not divide hidden_size"),
        (["--train-iterations", "3"], "train"),
        (["--fp16"], "use --bf16 or fp32"),
    ):
        done = subprocess.run(
            [sys.executable, SCRIPT, *MODEL, "--save", str(tmp_path / "run"), *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert text in done.stderr and "Traceback" not in done.stderr


def test_non_finite_loss_names_step_and_parameter(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, *MODEL, "--save", str(tmp_path / "run"), "--zero-stage", "0", "--lr", "1e30",
         "--clip-grad", "0", "--lr-decay-style", "constant", "--save-interval", "1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "is nan on rank 0" in done.stderr and "non-finite" in done.stderr and "Traceback" not in done.stderr
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert told["cause"] == "non_finite" and told["code"] == 3
