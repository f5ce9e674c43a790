"""tools/supervise.py: what it starts again and what it does not, how it stops, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import TOOLS

from megatron_lite.monitor import exit_file
from megatron_lite.monitor.supervisor import Patience

FAKE = '''
"""A trainer that does what its next line of plan.txt says."""
import json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--save") + 1])
plan = folder.parent / "plan.txt"
first, *rest = plan.read_text().splitlines()
plan.write_text("\\n".join(rest))

def tell(cause, code):
    folder.mkdir(exist_ok=True)
    record = {"cause": cause, "code": code, "step": 1, "how_to_go_on": "", "message": "why\\nmore"}
    (folder / "new").write_text(json.dumps(record))
    (folder / "new").rename(folder / "exit.json")

for word in first.split():
    name, _, value = word.partition("=")
    if name == "step":
        (folder / f"step-{int(value):08d}").mkdir(parents=True)
    elif name == "tell":
        cause, code = value.split(":")
        tell(cause, int(code))
    elif name == "damage":
        (folder / "exit.json").write_text("half")
    elif name == "orphan":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder.parent / "orphan").write_text(str(child.pid))
    elif name == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: (tell("signal_SIGTERM", 0), sys.exit(0)))
        (folder.parent / "asleep").touch()
        time.sleep(float(value))
    elif name == "die":
        os.kill(os.getpid(), int(value))
    elif name == "exit":
        sys.exit(int(value))
'''


def start(folder: Path, *plan: str, options=(), before="pass") -> subprocess.Popen:
    """The supervisor of a fake trainer that does a line of `plan` an attempt."""
    (folder / "pretrain_gpt.py").write_text(FAKE)
    (folder / "plan.txt").write_text("\n".join(plan))
    tool = [str(TOOLS / "supervise.py"), "--pause-seconds", "0", *options, "--", sys.executable]
    command = [*tool, str(folder / "pretrain_gpt.py"), "--save", str(folder / "run"), "--save-interval", "5"]
    code = f"import runpy, sys\n{before}\nsys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


def attempts(folder: Path) -> list[tuple]:
    lines = (folder / "run" / "restarts.jsonl").read_text().splitlines()
    return [(r["cause"], r["code"], r["newest_step"]) for r in map(json.loads, lines)]


def test_what_may_pass_is_tried_again_until_the_run_is_done(tmp_path):
    plan = ["step=5 tell=lost_rank:5 exit=1", "step=10 die=9", "tell=hang:4 exit=1", "step=15 tell=done:0"]
    code, said = ended(start(tmp_path, *plan, "never"))
    assert code == 0
    assert attempts(tmp_path) == [("lost_rank", 5, 5), (None, 137, 10), ("hang", 4, 10), ("done", 0, 15)]
    assert "lost_rank: why. Starting again at once from step 5 (restart 1 of 10)" in said
    assert "the launcher ended with signal SIGKILL and the run left no word" in said
    assert (tmp_path / "plan.txt").read_text() == "never"


@pytest.mark.parametrize(("cause", "code"), [("user_error", 2), ("non_finite", 3), ("replicas_differ", 3), ("done", 0)])
def test_what_would_happen_again_is_not_tried_again(tmp_path, cause, code):
    assert ended(start(tmp_path, f"tell={cause}:{code} exit=1", "never"))[0] == code
    assert attempts(tmp_path) == [(cause, code, 0)]


def test_it_gives_up_without_progress_and_after_so_many_restarts(tmp_path):
    fruitless = ["step=5 die=9", "exit=7", "exit=7", "exit=7", "never"]
    code, said = ended(start(tmp_path, *fruitless))
    assert code == 7 and "Giving up: 3 attempts in a row published no checkpoint after step 5" in said
    assert len(attempts(tmp_path)) == 4
    other = tmp_path / "other"
    other.mkdir()
    code, said = ended(start(other, "step=1 exit=1", "step=2 exit=1", "never", options=("--auto-restart", "1")))
    assert code == 1 and "Giving up: it was restarted 1 times (--auto-restart 1)" in said


def test_it_waits_longer_and_longer_while_no_progress_is_made():
    patience = Patience(restarts=9, pause_seconds=5.0)
    assert [patience.pause(fruitless) for fruitless in (0, 1, 2, 3, 9)] == [0, 5, 10, 20, 120]


def test_the_word_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"cause": "done", "code": 0, "message": ""}')
    assert ended(start(tmp_path, "exit=1", "tell=done:0"))[0] == 0
    assert attempts(tmp_path) == [(None, 1, 0), ("done", 0, 0)]


def test_a_word_that_could_not_be_looked_at_for_once_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"cause": "done", "code": 0, "message": ""}')
    before = (
        "from pathlib import Path; stat = Path.stat; calls = iter([0, 1, 1, 0])\n"
        "def once(self, **how):\n"
        "    if self.name == 'exit.json' and not next(calls, 1): raise OSError(116, 'Stale file handle', str(self))\n"
        "    return stat(self, **how)\n"
        "Path.stat = once"
    )
    plan = ["exit=1", "exit=1", "tell=done:0"]
    code, said = ended(start(tmp_path, *plan, before=before))
    # Not looked at before the first attempt, and not after the second.
    assert code == 0 and attempts(tmp_path) == [(None, 1, 0), (None, 1, 0), ("done", 0, 0)]
    assert "Stale file handle" in said and "it counts if it is written from now on" in said


def test_whatever_the_launcher_ends_with_is_told_and_tried_again(tmp_path):
    """247 is 256 - 9, of DeepSpeed's launcher; 255 that of mpirun and ssh."""
    code, said = ended(start(tmp_path, "step=1 exit=255", "step=2 exit=247", "step=3 exit=200", "tell=done:0"))
    assert code == 0 and [code for _, code, _ in attempts(tmp_path)] == [255, 247, 200, 0]
    for how in ("exit code 255", "signal SIGKILL", "exit code 200"):
        assert f"the launcher ended with {how} and the run left no word" in said


def test_a_damaged_word_is_none(tmp_path):
    words = ["", "{", "[]", '{"cause": "done"}', '{"cause": "done", "code": "0", "message": ""}', "\ud800", "[" * 10**5]
    for word in words:
        (tmp_path / exit_file.NAME).write_bytes(word.encode(errors="surrogatepass"))
        assert exit_file.read_exit(tmp_path) is None, word
    (tmp_path / "run").mkdir()
    code, _ = ended(start(tmp_path, "step=1 tell=done:0 damage exit=1", "tell=done:0"))
    assert code == 0 and attempts(tmp_path) == [(None, 1, 1), ("done", 0, 1)]


def test_a_folder_that_cannot_be_listed_for_once_ends_nothing(tmp_path):
    before = (
        "from megatron_lite.checkpoint import store as s; listed = s.steps; calls = iter([1, 0, 1, 1])\n"
        "def steps(root):\n"
        "    if not next(calls): raise OSError('Stale file handle')\n"
        "    return listed(root)\n"
        "s.steps = steps"
    )
    code, said = ended(start(tmp_path, "step=5 exit=1", "tell=done:0", before=before))
    assert code == 0 and attempts(tmp_path) == [(None, 1, 0), ("done", 0, 5)]
    assert "how far the checkpoints are cannot be told: Stale file handle" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_is_started_after_it(tmp_path, number):
    process = start(tmp_path, "sleep=100", "never")
    deadline = time.monotonic() + 120
    while not (tmp_path / "asleep").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    code, _ = ended(process)
    assert code == (0 if number == signal.SIGTERM else 130)  # the fake obeys the one and dies of the other
    assert len(attempts(tmp_path)) == 1 and (tmp_path / "plan.txt").read_text() == "never"


def test_processes_that_outlive_their_launcher_are_ended(tmp_path):
    before = "import megatron_lite.monitor.supervisor as s; s._SURVIVORS_SECONDS = 1.0"
    code, said = ended(start(tmp_path, "orphan die=9", "tell=done:0", before=before))
    assert code == 0 and "1 processes outlived their launcher by 1 s: ending them" in said
    assert not psutil.pid_exists(int((tmp_path / "orphan").read_text()))


def test_what_cannot_be_kept_going_is_refused(tmp_path):
    trainer = str(TOOLS.parent / "pretrain_gpt.py")
    for words, said in (
        ([], "there is no command"),
        (["--", "no-such-launcher", trainer], "no-such-launcher is no program"),
        (["--", sys.executable, "train.py"], "does not start pretrain_gpt.py"),
        (["--", sys.executable, trainer, "--mock-data"], "saves no checkpoints"),
        (["--", sys.executable, trainer, "--save", str(tmp_path / "x"), "--resume", "never"], "--resume never forbids"),
        (["--auto-restart", "-1", "--", sys.executable, trainer], "--auto-restart -1 is too small"),
        (["--auto-restarts", "1"], "--auto-restart"),
        ([sys.executable, trainer], "belongs to the command to supervise, it seems; write it after --"),
        (["--auto-restart", "3", "torchrun", trainer], "write it after --"),
    ):
        done = subprocess.run([sys.executable, str(TOOLS / "supervise.py"), *words], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_run_killed_at_random_ends_as_one_left_alone(tmp_path):
    """Ranks are killed until the run is done; every loss is that of a run that nobody killed."""
    trainer = str(TOOLS.parent / "pretrain_gpt.py")
    model = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 300 --seq-length 16".split()
    model += "--mock-data --global-batch-size 4 --train-iters 200 --eval-interval 0 --save-interval 5".split()
    model += "--hidden-dropout 0.1 --zero-stage 0 --tensorboard-dir none --keep-last 3".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, trainer, *model, "--save", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, capture_output=True, env=environment, timeout=600)
    run, draw, kills = tmp_path / "run", random.Random(0), 0
    tool = [sys.executable, str(TOOLS / "supervise.py"), "--pause-seconds", "0", "--auto-restart", "20", "--"]
    with subprocess.Popen([*tool, *alone[:-1], str(run)], env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            metrics = run / "metrics.jsonl"
            seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            if kills < 3 and seen >= 40 * (kills + 1) + draw.randrange(4):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for rank in psutil.Process(process.pid).children():
                        rank.kill()
                kills += 1
            time.sleep(0.005)
        process.kill()
    causes = [cause for cause, _, _ in attempts(tmp_path)]
    assert kills >= 1 and causes == [None] * (len(causes) - 1) + ["done"] and len(causes) > 1

    def losses(folder: Path) -> list[tuple]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["loss"], r["samples_crc32"]) for r in records]

    assert losses(run) == losses(tmp_path / "alone") and len(losses(run)) == 200
