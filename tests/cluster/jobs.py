"""Training as a cluster's user starts it, on nodes of `nodes.py`: the scripts of examples/cluster/, and what comes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.nodes import Node, wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "cluster"
PYTHON = Path(sys.executable)
STEPS = 4
"""Steps whose losses are compared."""
MODEL = (
    "--mock-data --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 64 "
    "--global-batch-size 4 --eval-interval 0 --log-interval 1000 --tensorboard-dir none --zero-stage 0 "
    "--lr-decay-iters 1000 --save-interval 20 --keep-last 2 --distributed-timeout-minutes 2"
).split()
FOR_EVER = ("--train-iters", "1000000")
ENVIRONMENT = {
    "PATH": f"{PYTHON.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": os.environ.get("HOME", "/root"),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "LANG": "C.UTF-8",
}


@dataclasses.dataclass
class Job:
    """A launcher that was started, its run folder and what it says."""

    run: Path
    output: Path
    launcher: subprocess.Popen

    def losses(self) -> list[float]:
        """The loss of each step so far."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]

    def first_losses(self, number: int = STEPS) -> list[float]:
        """The losses of that many steps, once they are there."""
        wait_for(lambda: self._has_ended() or len(self.losses()) >= number, 400, "the first steps", self.said)
        assert len(self.losses()) >= number, self.said()
        return self.losses()[:number]

    def _has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def wait(self, seconds: float) -> int:
        """The launcher's exit code, within that time."""
        wait_for(self._has_ended, seconds, "the launcher's end", self.said)
        return self.launcher.returncode

    def told(self) -> dict:
        """exit.json, once it is there."""
        wait_for((self.run / "exit.json").exists, 160, "exit.json", self.said)
        return json.loads((self.run / "exit.json").read_text())

    def said(self) -> str:
        """The console's end, and the end of each rank's log."""
        files = [self.output, *sorted((self.run / "logs").glob("*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.exists())


def start(words: Sequence[object], folder: Path, *, on: Node | None = None, **environment: str) -> Job:
    """A job begun in `folder`, on a node or on this machine itself; its run folder is `folder/run`."""
    folder.mkdir(exist_ok=True)
    command = [str(word) for word in words] if on is None else on.command(*words, folder=folder)
    output = folder / "output"
    with output.open("a") as stream:
        launcher = subprocess.Popen(
            command,
            cwd=folder,
            env={**ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(folder / "run", output, launcher)
