#!/usr/bin/env python
"""Training jobs killed at random, over and over: is the newest acknowledged checkpoint always there, and right?

A run of two ranks saves every step. At a random moment one rank or both are killed, or a rank is stopped for a while,
or the disk refuses larger files for a moment. After each life of a run:

- ranks that were left over have ended by themselves,
- every step that was acknowledged ("saved step N") is found, complete by its checksums, or a newer one,
- what is found equals, by checksum of every tensor, that step of a run that nobody disturbed,
- now and then a bit of it is flipped: then it is refused, and the step before is found.

The run goes on until it is through, and its losses are those of the undisturbed run, to the last bit.

    OMP_NUM_THREADS=1 python tools/bench/soak.py --kills 200 --output results.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, RANKS, KEPT = 12, 2, 3
UNDISTURBED = "undisturbed"
PATIENCE = 10.0
"""Seconds a rank waits for another that may be gone before they have met; later it is told at once."""
LONGEST_FAREWELL = 60.0
"""Seconds a rank may take to end once another is gone."""
REFUSED_BYTES = 20_000
"""While the disk refuses, files may not grow beyond this: metrics fit, tensors do not."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout of two ranks and a way to save."""

    name: str
    parallel: dict[str, Any]
    bf16: bool = False
    optimizer: str = "adamw"
    in_background: bool = True

    def sections(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The configuration of the run that saves to `folder`; the undisturbed one keeps all steps, to compare with."""
        data_size = RANKS // self.parallel.get("tensor_model_parallel_size", 1)
        return {
            "model": {
                "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 500,
                "max_position_embeddings": 16,
            },
            "parallel": self.parallel,
            "precision": {"bf16": self.bf16},
            "optimizer": {"optimizer": self.optimizer},
            "data": {"mock_data": True, "seq_length": 16},
            "training": {
                "train_iters": STEPS, "micro_batch_size": 4 // data_size, "global_batch_size": 4, "eval_interval": 0,
            },
            "checkpoint": {
                "save": str(folder), "save_interval": 1, "keep_last": None if folder.name == UNDISTURBED else KEPT,
                "async_save": self.in_background,
            },
            "logging": {"tensorboard_dir": "none"},
        }  # fmt: skip


CASES = (
    Case("data 2, ZeRO 0", {"zero_stage": 0}),
    Case("tensor 2, ZeRO 1, bf16", {"tensor_model_parallel_size": 2, "zero_stage": 1}, bf16=True),
    Case("data 2, ZeRO 2, 8-bit", {"zero_stage": 2}, optimizer="adamw8bit"),
    Case("data 2, ZeRO 3", {"zero_stage": 3}),
    Case("data 2, ZeRO 1, saves stop training", {"zero_stage": 1}, in_background=False),
)


class Life:
    """The ranks of a run from their start to their end, forked from this process."""

    def __init__(self, case: Case, folder: Path):
        self._case = case
        self._folder = folder
        self.log = Path(tempfile.mkstemp(prefix="log-", dir=folder.parent)[1])
        self._store = f"{self.log}.store"
        self.alive = {self._fork(rank): rank for rank in range(RANKS)}
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int) -> int:
        if process := os.fork():
            return process
        code = 1
        with contextlib.suppress(BaseException):
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                _train(self._case, self._folder, rank, self._store)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
        # No farewell: what this process was forked from is not its to close.
        os._exit(code)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended, after so many seconds at most."""
        end = time.monotonic() + seconds
        while self.alive:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                self.codes[self.alive.pop(process)] = status
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.01)
        return True

    def send(self, number: int, ranks: set[int]) -> int:
        """Send a signal to those of the ranks that are alive; how many."""
        reached = [process for process, rank in self.alive.items() if rank in ranks]
        for process in reached:
            os.kill(process, number)
        return len(reached)

    def limit_files(self, size: int) -> None:
        """Let no rank's file grow beyond `size`."""
        for process in self.alive:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    @property
    def seconds_of_steps(self) -> float:
        """What its steps took, by its own account."""
        lines = (json.loads(line) for line in (self._folder / "metrics.jsonl").read_text().splitlines())
        return sum(line.get("iteration_time", 0.0) for line in lines)

    @property
    def acknowledged(self) -> int:
        """The newest step that was said to be saved."""
        return max([0, *map(int, re.findall(r"saved step (\d+) in", self.log.read_text()))])

    @property
    def not_saved(self) -> int:
        """Checkpoints that were said to be lost."""
        return len(re.findall(r"was not saved .*; training goes on", self.log.read_text()))


def _train(case: Case, folder: Path, rank: int, store: str) -> None:
    from datetime import timedelta

    from torch import distributed as dist

    from megatron_lite import log
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.parallel.launch import StopRequest
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.start import train_on

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    log.configure(rank, RANKS)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=patience)
    shape = MeshShape.of_world(RANKS, tensor=case.parallel.get("tensor_model_parallel_size", 1))
    train_on(
        ProcessMesh.create(shape, timeout=patience),
        sources.override(RunConfig(), case.sections(folder)),
        StopRequest(),
        "the same again",
    )
    dist.barrier()


class OneRank:
    """This process, as a reader of checkpoints."""

    global_rank, world_size = 0, 1

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]


class Soak:
    """One case, run after run; `failures` are the promises that were broken."""

    def __init__(self, case: Case, folder: Path, chance: random.Random):
        self.case, self.counts, self.failures = case, Counter(), []
        self._folder, self._chance = folder, chance
        folder.mkdir()
        began = time.monotonic()
        self._undisturbed = self._folder / UNDISTURBED
        life = Life(case, self._undisturbed)
        if not life.wait(600) or any(life.codes.values()):
            raise SystemExit(f"{case.name} fails when nobody disturbs it:\n{life.log.read_text()}")
        self._duration = time.monotonic() - began
        self._step_seconds = life.seconds_of_steps / STEPS
        self._losses = _losses(self._undisturbed)

    def run(self, kills: int) -> None:
        """Runs, one after another, until so many kills have hit them and the last one is through."""
        before = self.counts["kills"]
        while self.counts["kills"] - before < kills and not self.failures:
            folder = self._folder / f"run-{self.counts['runs']}"
            acknowledged, is_through = 0, False
            while not is_through and not self.failures:
                disturb = self.counts["kills"] - before < kills
                life = Life(self.case, folder)
                is_through = self._live(life, disturb)
                self.counts["lives"] += 1
                self.counts["not saved"] += life.not_saved
                acknowledged = max(acknowledged, life.acknowledged)
                self._check(folder, acknowledged, life)
            self.counts["runs"] += 1
            if not self.failures and _losses(folder) != self._losses:
                self._fail("its losses are not those of the undisturbed run", life)
            if not self.failures:
                shutil.rmtree(folder)

    def _live(self, life: Life, disturb: bool) -> bool:
        """Whether the run came to its end, in spite of what was done to it."""
        chance = self._chance
        if disturb and self._wait_for_a_moment(life):
            deed = chance.random()
            if deed < 0.15:
                self.counts["stops"] += life.send(signal.SIGSTOP, {(rank := chance.randrange(RANKS))}) > 0
                life.wait(chance.uniform(0.05, 0.3))
                life.send(signal.SIGCONT, {rank})
            elif deed < 0.3:
                life.limit_files(REFUSED_BYTES)
                self.counts["refusals"] += 1
                life.wait(chance.uniform(0.05, 0.3))
                life.limit_files(resource.RLIM_INFINITY)
            if not life.wait(chance.uniform(0, 2) * self._step_seconds):
                victims = {0, 1} if chance.random() < 0.3 else {chance.randrange(RANKS)}
                self.counts["kills"] += life.send(signal.SIGKILL, victims) > 0
        if not life.wait(600 if not disturb else LONGEST_FAREWELL + 10 * self._duration):
            self._fail("a rank does not end though another is gone", life)
            life.send(signal.SIGKILL, set(range(RANKS)))
            life.wait(60)
        return not any(life.codes.values())

    def _wait_for_a_moment(self, life: Life) -> bool:
        """Wait for a random moment of this life: while it starts, or some time into a random step."""
        if self._chance.random() < 0.15:
            return not life.wait(self._chance.uniform(0, 0.5) * self._duration)
        target = self._chance.randrange(STEPS)
        while not life.wait(0.01):
            if life.acknowledged >= target:
                return not life.wait(self._chance.uniform(0, 2) * self._step_seconds)
        return False

    def _check(self, folder: Path, acknowledged: int, life: Life) -> None:
        from megatron_lite.checkpoint.find import find
        from megatron_lite.checkpoint.manifest import read_manifest
        from megatron_lite.errors import CheckpointError

        try:
            found = find(folder, OneRank())
        except CheckpointError as error:
            return self._fail(str(error), life)
        if found is None:
            if acknowledged:
                self._fail(f"step {acknowledged} was said to be saved, and there is nothing", life)
            return None
        manifest = read_manifest(found)
        if manifest.step < acknowledged:
            self._fail(f"step {acknowledged} was said to be saved, and the newest is {manifest.step}", life)
        same = self._reference(manifest.step)
        if manifest.tensors != same.tensors or manifest.state["progress"] != same.state["progress"]:
            self._fail(f"step {manifest.step} is not that of the undisturbed run", life)
        self.counts["checks"] += 1
        if self._chance.random() < 0.2:
            self._damage(folder, found, life)
        return None

    def _reference(self, step: int) -> Any:
        from megatron_lite.checkpoint.manifest import read_manifest

        return read_manifest(self._undisturbed / f"step-{step:08d}")

    def _damage(self, folder: Path, found: Path, life: Life) -> None:
        """Flip a bit of the newest checkpoint, look, and flip it back."""
        from megatron_lite.checkpoint.find import find
        from megatron_lite.errors import CheckpointError

        file = self._chance.choice(sorted(found.iterdir()))
        at = self._chance.randrange(file.stat().st_size)
        _flip(file, at)
        with contextlib.suppress(CheckpointError):
            if find(folder, OneRank()) == found:
                self._fail(f"bit {at} of {file} is flipped, and nobody saw it", life)
        _flip(file, at)
        self.counts["bit flips"] += 1

    def _fail(self, text: str, life: Life) -> None:
        self.failures.append(f"{self.case.name}: {text}; the log ends with\n{life.log.read_text()[-2000:]}")


def _flip(file: Path, at: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << at % 8]))


def _losses(folder: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def told(counts: Counter, broken: int) -> str:
    """What was done, and what came of it, on one line."""
    return (
        f"{counts['kills']} kills, {counts['stops']} stops, {counts['refusals']} refusals of the disk and "
        f"{counts['bit flips']} bit flips: {counts['checks']} checkpoints found and right, {counts['runs']} runs "
        f"through with the losses of an undisturbed one, {counts['not saved']} checkpoints lost aloud, {broken} "
        f"promises broken"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so long")
    names = "; ".join(f"{number}: {case.name}" for number, case in enumerate(CASES))
    parser.add_argument(
        "--cases", type=int, nargs="+", choices=range(len(CASES)), default=range(len(CASES)), help=names
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    import torch

    from megatron_lite import log
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.kernels import extension, host
    from megatron_lite.monitor.versions import versions
    from megatron_lite.train.engine import load_libraries

    torch.set_num_threads(1)
    # What this process says of checkpoints that it looks at is not the output.
    log.configure(1, 2)
    # Compiled by a rank, they would try the patience of the other.
    extension.load("cpu")
    host.module()
    cases = [CASES[number] for number in options.cases]
    load_libraries(
        sources.override(RunConfig(), {"parallel": {"zero_stage": max(c.parallel["zero_stage"] for c in cases)}})
    )
    began, chance = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        soaks = [Soak(case, Path(folder) / str(number), chance) for number, case in enumerate(cases)]
        killed = 0
        while killed < options.kills and time.monotonic() - began < 60 * options.minutes:
            soak = min(soaks, key=lambda soak: soak.counts["kills"])
            soak.run(min(5, -(-options.kills // len(soaks)), options.kills - killed))
            killed = sum(soak.counts["kills"] for soak in soaks)
            print(f"{killed} of {options.kills} kills, {time.monotonic() - began:.0f} s", flush=True)
            if soak.failures:
                break
    total, failures = sum((soak.counts for soak in soaks), Counter()), [text for s in soaks for text in s.failures]
    minutes = (time.monotonic() - began) / 60
    summary = f"in {minutes:.1f} minutes {told(total, len(failures))}"
    lines = [f"{soak.case.name}: {told(soak.counts, len(soak.failures))}" for soak in soaks]
    print("\n".join([*failures, *lines, summary]))
    if options.output:
        record = {
            "benchmark": "soak",
            "device": f"CPU {platform.machine().replace('_', '-')}, {os.cpu_count()} cores",
            "summary": summary,
            "seed": options.seed,
            "minutes": round(minutes, 1),
            "total": dict(total),
            "cases": {soak.case.name: dict(soak.counts) for soak in soaks},
            "failures": failures,
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
