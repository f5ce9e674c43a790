#!/usr/bin/env python
"""Effective training time: a run under tools/supervise.py of which a random rank is killed every few minutes.

The share is the time of useful steps over the wall time, from the command to the end: starts, validations, steps done
twice and everything between a fault and the next new step are what is missing to 1. Of each fault: seconds
from the kill until all ranks and their launcher are gone, until it is started again, and until the first step after it.

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
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --vocab-size 1024 --seq-length 128 --mock-data "
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-4 --train-iters 1000000 --lr-decay-iters 1000000 "
    "--eval-interval 0 --tensorboard-dir none --log-interval 100 --keep-last 2 --zero-stage 1"
).split()
_POLL_SECONDS = 0.02
_LONGEST_FAULT = 300.0


class Run:
    """A run under the supervisor, saving to `folder`."""

    def __init__(self, folder: Path, launcher: str, ranks: int, save_interval: int):
        self._metrics, self.history = folder / "run" / "metrics.jsonl", folder / "run" / "restarts.jsonl"
        self._log = folder / "log"
        training = [str(ROOT / "pretrain_gpt.py"), *MODEL, "--save", str(folder / "run")]
        command = [sys.executable, str(ROOT / "tools" / "supervise.py"), "--auto-restart", "10000", "--"]
        command += [*LAUNCHERS[launcher], str(ranks), *training, "--save-interval", str(save_interval)]
        self.began = time.monotonic()
        with open(self._log, "w") as log:
            self._supervisor = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def launcher(self) -> psutil.Process | None:
        """The process that the supervisor has started, while it lives."""
        found = [child for child in self._supervisor.children() if _is_alive(child)]
        return found[0] if found else None

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
        deadline = time.monotonic() + seconds
        while not is_reached():
            if self._supervisor.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"the run does not go on:\n{self._log.read_text()[-4000:]}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic()

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
        told = time.monotonic()
        self._supervisor.terminate()
        try:
            self._supervisor.wait(90)
        except psutil.TimeoutExpired:
            for process in [self._supervisor, *self._supervisor.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return told


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def fault(run: Run, chance: random.Random) -> dict[str, float]:
    """Kill a random rank and see the run go on; what that took, in seconds, and the steps that were lost."""
    before, reached = run.launcher(), run.records()[-1]["step"]
    chance.choice(run.ranks()).kill()
    killed = time.monotonic()
    gone = run.wait(lambda: run.launcher() != before, _LONGEST_FAULT)
    again = run.wait(lambda: run.launcher() is not None, _LONGEST_FAULT)
    first = run.wait_for_step()
    return {
        "until all are gone": gone - killed,
        "until started again": again - gone,
        "until the first step": first - again,
        "in all": first - killed,
        "steps lost": max(0, reached - run.records()[-1]["step"] + 1),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16.0, help="how long it trains")
    parser.add_argument("--kill-every", type=float, default=5.0, help="minutes of training before each kill")
    parser.add_argument("--save-interval", type=int, default=50, help="steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="deepspeed")
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
                time.sleep(max(0.0, next_kill - time.monotonic()))
                faults.append(fault(run, chance))
                print("; ".join(f"{value:.1f} {what}" for what, value in faults[-1].items()), flush=True)
                next_kill = time.monotonic() + 60 * options.kill_every
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            ended = run.stop()
        records, attempts = run.records(), len(run.history.read_text().splitlines())
    step_seconds = statistics.median(record["iteration_time"] for record in records)
    wall = ended - run.began
    useful = sum(record["iteration_time"] for record in records)
    medians = {what: statistics.median(found[what] for found in faults) for what in faults[0]} if faults else {}
    print(
        f"{len(faults)} kills in {wall / 60:.1f} minutes, {attempts} attempts: {len(records):,} useful steps "
        f"(median {step_seconds:.3f} s) = {useful / wall:.2%} of the time, "
        f"{useful / (ended - began):.2%} from the first step on"
    )
    print("; ".join(f"{value:.1f} {what}" for what, value in medians.items()), "(medians)")
    if options.output:
        from megatron_lite.monitor.versions import versions

        record = {
            "benchmark": "effective",
            "device": f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores",
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
