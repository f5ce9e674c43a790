#!/usr/bin/env python
"""Seconds from a command to its answer: `--help`, `--dry-run`, and the first training step.

The first step is timed by three launchers, from the command and from the start of the ranks: what
lies between is the launcher's. Each measure is taken several times, and the median stands.

    python tools/bench/startup.py --output results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "pretrain_gpt.py"
MODEL = [
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4", "--vocab-size", "2048"),
    *("--seq-length", "128", "--mock-data", "--micro-batch-size", "2", "--lr", "1e-3"),
    *("--train-iters", "1", "--eval-interval", "0"),
]
RANK = "--as-rank"


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LAUNCHERS = {
    "python, 1 rank": [sys.executable],
    "torchrun, 2 ranks": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "deepspeed, 2 ranks": [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators", "2", "--master_port", str(free_port())),
    ],
}


def as_rank(folder: Path, arguments: list[str]) -> None:
    """Note when this rank began, and be `pretrain_gpt.py` with `arguments`."""
    (folder / f"began-{os.getpid()}").write_text(repr(time.time()))
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(PRETRAIN), *arguments]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


def answer(arguments: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of `pretrain_gpt.py` with `arguments`, which ends by itself."""
    before, began = processor_time(), time.perf_counter()
    subprocess.run([sys.executable, PRETRAIN, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {"wall": time.perf_counter() - began, "cpu": processor_time() - before}


def processor_time() -> float:
    """Seconds that processors spent on what this process started and has seen the end of."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def first_step(launcher: list[str]) -> dict[str, float]:
    """Seconds to the first line of metrics, from the command and from the start of the last rank; and processor time,
    the launcher's and the end's included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = folder / "run" / "metrics.jsonl"
        command = [*launcher, __file__, RANK, name, *MODEL, "--run-dir", str(folder / "run")]
        before, began = processor_time(), time.time()
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
                time.sleep(0.01)
            seen = time.time()
            process.wait()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()}")
        ranks = max(float(path.read_text()) for path in folder.glob("began-*"))
    return {
        "from the command": seen - began,
        "from the ranks' start": seen - ranks,
        "cpu": processor_time() - before,
    }


def median_of(measures: list[dict[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {name: round(statistics.median(found[name] for found in measures), 3) for name in measures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="how often each measure is taken")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    results = {
        "--help": median_of([answer(["--help"]) for _ in range(options.times)]),
        "--dry-run": median_of([answer([*MODEL, "--dry-run"]) for _ in range(options.times)]),
    }
    for name, launcher in LAUNCHERS.items():
        results[f"first step by {name}"] = median_of([first_step(launcher) for _ in range(options.times)])
    for what, seconds in results.items():
        print(f"{what:34}", ", ".join(f"{value:6.2f} s {name}" for name, value in seconds.items()))
    if options.output:
        sys.path.insert(0, str(ROOT))
        from megatron_lite.monitor.versions import versions

        record = {
            "benchmark": "startup",
            "device": f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores",
            "seconds": results,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if RANK in sys.argv:
        # deepspeed puts an option of its own in front.
        position = sys.argv.index(RANK)
        as_rank(Path(sys.argv[position + 1]), sys.argv[1:position] + sys.argv[position + 2 :])
    else:
        main()
