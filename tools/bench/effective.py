#!/usr/bin/env python
"""Effective training time: a run under tools/supervise.py of which a random rank is killed every few minutes.

The share is the time of useful steps over the wall time, from the command to the end: the start, what is between steps,
steps done twice and everything between a fault and the next new step are what is missing to 1. Of each fault: seconds
from the kill until all ranks and their launcher are gone, what the launcher takes then to start ranks, and those to
their first step.

    OMP_NUM_THREADS=1 python tools/bench/effective.py --minutes 16 --kill-every 5 --output results.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "29731", "--num_accelerators"],
}
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --vocab-size 1024 --seq-length 128 --mock-data "
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-4 --train-iters 1000000 --lr-decay-iters 1000000 "
    "--eval-interval 0 --tensorboard-dir none --log-interval 100 --keep-last 2 --zero-stage 1"
).split()
_POLL_SECONDS = 0.02
_LONGEST_FAULT = 300.0


def now() -> float:
    """Seconds on the clock by which Linux notes when a process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Run:
    """A run under the supervisor, saving to `folder`."""

    def __init__(self, folder: Path, launcher: str, ranks: int, save_interval: int):
        self._metrics, self._history = folder / "run" / "metrics.jsonl", folder / "run" / "restarts.jsonl"
        self._log = folder / "log"
        training = [str(ROOT / "pretrain_gpt.py"), *MODEL, "--save", str(folder / "run")]
        command = [sys.executable, str(ROOT / "tools" / "supervise.py"), "--auto-restart", "10000", "--"]
        command += [*LAUNCHERS[launcher], str(ranks), *training, "--save-interval", str(save_interval)]
        self.began = now()
        with open(self._log, "w") as log:
            self._supervisor = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def attempts(self) -> int:
        """How many have ended; the next one begins with the last one's end."""
        with contextlib.suppress(FileNotFoundError):
            return len(self._history.read_text().splitlines())
        return 0

    def ranks(self) -> list[psutil.Process]:
        """Those that train, in the order of their ranks."""
        by_rank = {}
        for process in self._supervisor.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and process.name().startswith(("python", "pt_")):
                    by_rank[int(rank)] = process
        return [by_rank[rank] for rank in sorted(by_rank)]

    def records(self) -> list[dict[str, Any]]:
        """The steps that count, each once: those that a restart went back behind are not among them."""
        from megatron_lite.monitor.history import read_history

        return [record for record in read_history(self._metrics) if "loss" in record]

    def mark(self) -> tuple[int, int]:
        """What changes with a step: the file of metrics, made anew where steps are taken back, and its size."""
        with contextlib.suppress(FileNotFoundError):
            found = self._metrics.stat()
            return found.st_ino, found.st_size
        return 0, 0

    def wait(self, is_reached, seconds: float) -> float:
        """Wait until something is so, and return when that was. Raises SystemExit with the log where it never is."""
        deadline = now() + seconds
        while not is_reached():
            if self._supervisor.poll() is not None or now() > deadline:
                self.stop()
                raise SystemExit(f"the run does not go on:\n{self._log.read_text()[-4000:]}")
            time.sleep(_POLL_SECONDS)
        return now()

    def wait_for_step(self, seconds: float = _LONGEST_FAULT) -> float:
        """Wait for the next step that is done."""
        before = self.mark()

        def is_done() -> bool:
            nonlocal before
            now = self.mark()
            if now[0] != before[0]:
                before = now
            return now[1] > before[1]

        return self.wait(is_done, seconds)

    def stop(self) -> float:
        """End it as a user does; the moment it was told to."""
        told = now()
        self._supervisor.terminate()
        try:
            self._supervisor.wait(90)
        except psutil.TimeoutExpired:
            for process in [self._supervisor, *self._supervisor.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return told


def _started(process: psutil.Process) -> float:
    """When a process was started."""
    # psutil's own time of it is as exact as the whole second at which it takes the machine to have begun.
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def fault(run: Run, chance: random.Random) -> dict[str, float]:
    """Kill a random rank and see the run go on; what that took, in seconds, and the steps that were lost."""
    before, reached, victim = run.attempts(), run.records()[-1]["step"], chance.choice(run.ranks())
    killed = now()
    victim.kill()
    gone = run.wait(lambda: run.attempts() > before, _LONGEST_FAULT)
    first = run.wait_for_step()
    started = max(map(_started, run.ranks()))
    return {
        "until all are gone": gone - killed,
        "until the ranks are started": started - gone,
        "until their first step": first - started,
        "in all": first - killed,
        "steps lost": max(0, reached - run.records()[-1]["step"] + 1),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16.0, help="how long it trains")
    parser.add_argument("--kill-every", type=float, default=5.0, help="minutes of training before each kill")
    parser.add_argument("--save-interval", type=int, default=10, help="steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun")
    parser.add_argument("--seed", type=int, default=0, help="of the ranks that are killed")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    chance, faults = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.launcher, options.ranks, options.save_interval)
        try:
            began = run.wait_for_step()
            end, next_kill = run.began + 60 * options.minutes, began + 60 * options.kill_every
            while not faults or next_kill < end:
                time.sleep(max(0.0, next_kill - now()))
                faults.append(fault(run, chance))
                print("; ".join(f"{value:.1f} {what}" for what, value in faults[-1].items()), flush=True)
                next_kill = now() + 60 * options.kill_every
            time.sleep(max(0.0, end - now()))
        finally:
            ended = run.stop()
        records = run.records()
    step_seconds = statistics.median(record["iteration_time"] for record in records)
    wall = ended - run.began
    useful = sum(record["iteration_time"] for record in records)
    medians = {what: statistics.median(found[what] for found in faults) for what in faults[0]}
    summary = (
        f"{len(faults)} kills in {wall / 60:.1f} minutes under {options.launcher}: {useful / wall:.2%} of the time is "
        f"{len(records):,} useful steps of {step_seconds:.3f} s; {useful / (ended - began):.2%} from the first one on; "
        f"{medians['in all']:.1f} s from a fault to the first new step, {medians['steps lost']:g} steps lost (medians)"
    )
    print(summary)
    if options.output:
        from megatron_lite.monitor.versions import versions

        record = {
            "benchmark": "effective",
            "device": f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores",
            "summary": summary,
            "launcher": options.launcher,
            "ranks": options.ranks,
            "kill_every_minutes": options.kill_every,
            "save_interval": options.save_interval,
            "seconds": wall,
            "seconds_to_the_first_step": began - run.began,
            "useful_steps": len(records),
            "step_seconds": step_seconds,
            "effective": useful / wall,
            "effective_from_the_first_step": useful / (ended - began),
            "faults": faults,
            "median_fault": medians,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
