"""A run that hangs says which rank is behind and ends, however it is stuck; one that does not goes on."""

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

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "pretrain_gpt.py")
MODEL = (
    "--mock-data --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 64 "
    "--eval-interval 0 --train-iters 1000000 --log-interval 1000 --tensorboard-dir none --global-batch-size 4"
).split()
LIMIT = ["--hang-limit-minutes", "0.2"]
PIPELINE = ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"]
#: A rank whose storage does not answer: from the third step on it opens a pipe to which nobody writes.
STUCK_READING = """
import os, sys
sys.path.insert(0, {root!r})
from megatron_lite.data.loader import BatchLoader
step, pipe = BatchLoader.step, {pipe!r}

def stuck(self, consumed, batch_size):
    if consumed >= 8 and os.environ["RANK"] == "1":
        os.open(pipe, os.O_RDONLY)
    return step(self, consumed, batch_size)

BatchLoader.step = stuck
import pretrain_gpt
sys.argv[0] = "pretrain_gpt.py"
sys.exit(pretrain_gpt.main(sys.argv[1:]))
"""


class Ranks:
    """Ranks that were started without a launcher, each of whose exit codes is seen as it is."""

    def __init__(self, folder: Path, size: int, *flags: str, program: tuple[str, ...] = (SCRIPT,)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.run, self.processes = folder / "run", []
        for rank in range(size):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = {name: str(value) for name, value in places.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            with open(folder / f"console-{rank}", "w") as console:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *program, *MODEL, *flags, "--save", str(self.run)],
                        stdout=console,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **environment},
                        cwd=ROOT,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run.parent.glob("console-*")))

    def wait_for_steps(self, count: int = 3) -> None:
        wait_for_steps(self.run, count, self.said)

    def codes(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(120) for rank in ranks]

    def told(self) -> dict:
        return json.loads((self.run / "exit.json").read_text())

    def page(self) -> str:
        (page,) = self.run.glob("hang-*/page.txt")
        return page.read_text()


def wait_for_steps(run: Path, count: int, said) -> None:
    deadline, metrics = time.monotonic() + 150, run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def test_a_stopped_rank_of_a_pipeline(tmp_path):
    with Ranks(tmp_path, 4, *PIPELINE, *LIMIT) as ranks:
        ranks.wait_for_steps()
        ranks.processes[2].send_signal(signal.SIGSTOP)
        assert ranks.codes(0, 1, 3) == [4, 4, 4], ranks.said()
        page, told, process = ranks.page(), ranks.told(), ranks.processes[2].pid
    behind = page.partition("behind:\n")[2].partition("\n\n")[0]
    assert behind.startswith("  rank 2 ("), page
    assert f"process {process}) gave no word: its process is stopped" in behind, page
    assert "\n" not in behind, "nobody else is accused"
    assert "--hang-limit-minutes" in page and "waits for rank 2" in page, page
    assert (told["cause"], told["code"]) == ("hang", 4) and "rank 2 (" in told["message"]
    # The rank that found it out may be a step before or behind the one that tells.
    assert abs(told["step"] + 1 - int(page.partition("training step ")[2].split()[0])) <= 1
    assert ranks.said().count("THIS RUN HANGS") == 1
    words = {path.name: json.loads(path.read_text()) for path in ranks.run.glob("hang-*/rank-*.json")}
    assert sorted(words) == [f"rank-0000{rank}.json" for rank in (0, 1, 3)]
    for word in words.values():
        main_thread = next(iter(word["stacks"].values()))
        assert any("in _one_step" in line for line in main_thread)


def test_a_rank_whose_storage_does_not_answer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    program = ("-c", STUCK_READING.format(root=str(ROOT), pipe=str(tmp_path / "pipe")))
    with Ranks(tmp_path, 2, "--zero-stage", "0", *LIMIT, program=program) as ranks:
        assert ranks.codes(0, 1) == [4, 4], ranks.said()
        page, told = ranks.page(), ranks.told()
    behind = page.partition("behind:\n")[2].partition("\n\n")[0]
    assert behind.startswith("  rank 1 (") and "it is in training step 3, reading samples" in behind, page
    assert "has not come to all_reduce" in behind and "megatron_lite/train/reading.py" in behind, page
    assert "rank 0: training step 3, reading samples: waits for rank 1 in all_reduce" in page, page
    assert (told["cause"], told["code"], told["step"]) == ("hang", 4, 2)


def test_a_collective_that_gives_up_has_the_page_made(tmp_path):
    with Ranks(tmp_path, 2, "--zero-stage", "0", "--distributed-timeout-minutes", "1") as ranks:
        ranks.wait_for_steps()
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.codes(0) == [4], ranks.said()
        page, told = ranks.page(), ranks.told()
    assert "--distributed-timeout-minutes" in page.splitlines()[0], page
    assert "rank 1 (" in page.partition("behind:\n")[2].splitlines()[0], page
    assert (told["cause"], told["code"]) == ("hang", 4)


def test_a_killed_rank_is_no_hang(tmp_path):
    with Ranks(tmp_path, 2, "--zero-stage", "0") as ranks:
        ranks.wait_for_steps()
        ranks.processes[1].kill()
        assert ranks.codes(0) == [5], ranks.said()
        told = ranks.told()
    assert (told["cause"], told["code"]) == ("lost_rank", 5) and "rank 1" in told["message"]
    assert not list(ranks.run.glob("hang-*"))


def test_torchrun_with_its_first_rank_stopped_and_no_run_folder(tmp_path):
    log = tmp_path / "console"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # Steps are seen by their lines on the console.
    flags = [*MODEL, *LIMIT, "--zero-stage", "0", "--log-interval", "1"]
    with open(log, "w") as console:
        process = subprocess.Popen(
            [*launcher, SCRIPT, *flags],
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
            cwd=ROOT,
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 150
        while log.read_text().count("s/step") < 3:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        first = next(p for p in family if SCRIPT in p.cmdline() and p.environ().get("RANK") == "0")
        first.send_signal(signal.SIGSTOP)
        assert process.wait(150) != 0
        # torchrun waits half a minute for the stopped one before it kills it.
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    said = log.read_text()
    assert f"process {first.pid}) gave no word: its process is stopped" in said, said
    assert "rank 1: training step" in said and "waits for rank 0" in said, said


def test_a_run_that_is_suspended_as_a_whole_goes_on(tmp_path):
    with Ranks(tmp_path, 1, "--zero-stage", "0", "--hang-limit-minutes", "0.1") as ranks:
        ranks.wait_for_steps()
        ranks.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(10)
        before = (ranks.run / "metrics.jsonl").read_text().count("\n")
        ranks.processes[0].send_signal(signal.SIGCONT)
        ranks.wait_for_steps(before + 10)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.codes(0) == [0], ranks.said()
    assert not list(ranks.run.glob("hang-*"))
