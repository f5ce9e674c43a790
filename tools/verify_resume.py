#!/usr/bin/env python
"""Proof that a run that was killed goes on as if nothing had been: trained twice, once unbroken and once killed.

python tools/verify_resume.py --config examples/quickstart.yaml --world-size 2 --steps 12 --layout tp=1,dp=2
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import cli, sources
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.logging import LoggingConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.parallel.door import exit_code_of
from megatron_lite.parallel.launch import Launch
from megatron_lite.parallel.launcher import descendants, start_command, takes_gpus
from megatron_lite.parallel.layout_line import parse_layout
from megatron_lite.train.rules import problems

TRAINER = Path(__file__).resolve().parents[1] / "pretrain_gpt.py"
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""How far losses may be apart in another layout, relative to them; weights and state twenty times as far."""
FED = ("samples_crc32", "consumed_samples", "consumed_tokens", "global_batch_size")
COMPUTED = ("loss", "grad_norm", "lr", "loss_scale")
_POLL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True)
class VerifyOptions(cli.SourceOptions):
    """What is trained, how often it is killed, and where it goes on."""

    world_size: int | None = None
    """Processes that train; default: as few as the configuration's parallel sizes allow."""
    layout: str | None = None
    """The layout in which the run goes on after a kill, on one line: tp=2,pp=2,zero=2 (axes left out are 1); default:
    that in which it began. In the same layout everything must be the same to the last bit."""
    steps: int = 12
    """Steps of training."""
    kills: int = 2
    """How often it is killed, each time after one more checkpoint."""
    tolerance: float | None = None
    """In another layout: how far losses may be apart, relative to them; default: by precision, 1e-5 in fp32."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the processes run; default: on GPUs where there is one for each."""

    @property
    def interval(self) -> int:
        """Steps between checkpoints."""
        return self.steps // (self.kills + 1)

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = []
        if self.kills < 1:
            found.append(f"--kills {self.kills} is too small; give 1 or more.")
        elif self.interval < 2:
            found.append(
                f"--steps {self.steps} leaves no room for {self.kills} kills with steps between them; give "
                f"{2 * (self.kills + 1)} or more."
            )
        if self.world_size is not None and self.world_size < 1:
            found.append(f"--world-size {self.world_size} is too small; give 1 or more.")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            found.append(f"--tolerance {self.tolerance:g} is out of range; give a number from 0 to below 1.")
        return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run and the one it is to go on as."""

    begun: RunConfig
    begun_ranks: int
    resumed: RunConfig
    resumed_ranks: int

    @property
    def is_one_layout(self) -> bool:
        return (self.begun, self.begun_ranks) == (self.resumed, self.resumed_ranks)


def plan(config: RunConfig, options: VerifyOptions, folder: Path) -> Plan:
    """The two runs, to be saved below `folder`, without what has no place in them. Raises ConfigError."""
    length = {"train_iters": options.steps, "train_samples": None, "train_tokens": None, "train_epochs": None}
    changes: sources.Overrides = {"training": {**length, "eval_interval": 0, "exit_interval": None}}
    if not (config.data.mock_data or config.data.data_path or config.data.train_data_path):
        changes["data"] = {"mock_data": True}
        log.note("no data are named, so tokens are generated (--mock-data)")
    config = dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(
            save=str(folder), save_interval=options.interval, async_save=config.checkpoint.async_save
        ),
        logging=LoggingConfig(tensorboard_dir="none"),
    )
    ranks = options.world_size or config.parallel.model_parallel_size
    # As a number of sequences the batch is the same on another number of ranks.
    data_size = max(1, ranks // config.parallel.model_parallel_size)
    changes["training"] |= {
        "global_batch_size": config.training.batch_size(data_size),
        "gradient_accumulation_steps": None,
    }
    config = resumed = sources.override(config, changes)
    resumed_ranks = ranks
    if options.layout is not None:
        layout = parse_layout(options.layout)
        resumed, resumed_ranks = layout.put_on(config), layout.shape.world_size
        if config.model.attention_dropout and resumed != config:
            config, resumed = (sources.override(c, {"model": {"attention_dropout": 0.0}}) for c in (config, resumed))
            log.note("attention_dropout is 0: in another layout each rank draws other masks")
    found = [*problems(config, ranks), *(problems(resumed, resumed_ranks) if options.layout else [])]
    if found:
        raise ConfigError(found)
    return Plan(config, ranks, resumed, resumed_ranks)


class Training:
    """Processes that train into `folder`, from its newest checkpoint on."""

    def __init__(self, config: RunConfig, ranks: int, folder: Path, *, on_gpus: bool):
        settings = folder.with_suffix(".yaml")
        config = sources.override(config, {"checkpoint": {"save": str(folder)}})
        settings.write_text(sources.dump(config), encoding="utf-8")
        command = [*start_command(ranks, on_gpus=on_gpus), str(TRAINER), "--config", str(settings)]
        self._said = folder.with_suffix(".log")
        with open(self._said, "ab") as said:
            self._process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self) -> None:
        """Wait for the end of training. Raises MegatronLiteError where it fails."""
        if code := self._process.wait():
            said = self._said.read_text(errors="replace").splitlines()
            kind = ConfigError if code == ConfigError.exit_code else MegatronLiteError
            raise kind("training failed:\n" + "\n".join(said[-20:]))

    def kill_after(self, is_reached: Callable[[], bool]) -> None:
        """End all of its processes at once, as a power failure would, when something has happened.

        Raises MegatronLiteError where it ends by itself before.
        """
        while not is_reached():
            if self._process.poll() is not None:
                self.finish()
                raise MegatronLiteError(
                    "training ended before it could be killed; give more --steps, or a larger model"
                )
            time.sleep(_POLL_SECONDS)
        self.kill()
        if self._process.returncode == 0:
            raise MegatronLiteError("training ended before it could be killed; give more --steps, or a larger model")

    def kill(self) -> None:
        """End all of its processes at once."""
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()


def verify(config: RunConfig, options: VerifyOptions) -> None:
    """Train unbroken and killed, and judge. Raises MegatronLiteError where they are not the same run."""
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as name:
        planned = plan(config, options, Path(name))
        on_gpus = takes_gpus(options.device, max(planned.begun_ranks, planned.resumed_ranks))
        unbroken, broken = Path(name, "unbroken"), Path(name, "broken")
        log.note(f"training {options.steps} steps unbroken, on {planned.begun_ranks} processes")
        _train(Training(planned.begun, planned.begun_ranks, unbroken, on_gpus=on_gpus))
        if (last := max(_records(unbroken), default=0)) < options.steps:
            raise ConfigError(
                f"training ends after {last} of --steps {options.steps} by itself, as where --when-exhausted ends it; "
                f"give --steps {last}."
            )
        train_and_kill(planned, options, broken, on_gpus=on_gpus)
        judge(unbroken, broken, planned, options)


def train_and_kill(planned: Plan, options: VerifyOptions, folder: Path, *, on_gpus: bool) -> None:
    """Train in `folder`, killed `options.kills` times, each time after one more checkpoint was published."""
    config, ranks = planned.begun, planned.begun_ranks
    for kill in range(1, options.kills + 1):
        at = kill * options.interval
        log.note(f"training on {ranks} processes until the checkpoint of step {at} is there, then killing them")
        training = Training(config, ranks, folder, on_gpus=on_gpus)
        _guarded(training, lambda training=training, at=at: training.kill_after(lambda: at in store.steps(folder)))
        config, ranks = planned.resumed, planned.resumed_ranks
    log.note(f"going on to step {options.steps} on {ranks} processes")
    _train(Training(config, ranks, folder, on_gpus=on_gpus))


def _train(training: Training) -> None:
    _guarded(training, training.finish)


def _guarded(training: Training, wait: Callable[[], None]) -> None:
    """Wait, and leave no process behind, whatever happens."""
    try:
        wait()
    except BaseException:
        training.kill()
        raise


def judge(unbroken: Path, broken: Path, planned: Plan, options: VerifyOptions) -> None:
    """Print the table of what two folders hold. Raises MegatronLiteError where they are not the same run."""
    exact = planned.is_one_layout
    dtype = planned.begun.precision.dtype
    tolerance = 0.0 if exact else TOLERANCES[dtype] if options.tolerance is None else options.tolerance
    ours, reference = _records(broken), _records(unbroken)
    if sorted(ours) != sorted(reference):
        raise MegatronLiteError(
            f"metrics.jsonl has steps {sorted(ours)} where the unbroken run has {sorted(reference)}"
        )
    rows: list[tuple[str, int, float, float]] = []
    for name in (*FED, *COMPUTED):
        apart = [_apart(ours[step].get(name), reference[step].get(name)) for step in sorted(reference)]
        # What a layout cannot change is the same in each.
        rows.append(
            (name, len(apart), max(apart), 0.0 if name in FED else 20 * tolerance if name == "grad_norm" else tolerance)
        )
    rows += _state_rows(broken, unbroken, options.steps, 20 * tolerance)
    width = max(len(name) for name, *_ in rows)
    print(f"{'':{width}}  {'compared':>8}  {'apart by':>8}  {'at most':>8}")
    for name, count, apart, most in rows:
        mark = "" if apart <= most else "  <- differs"
        print(f"{name:{width}}  {count:>8}  {_number(apart):>8}  {_number(most):>8}{mark}")
    if wrong := [name for name, _, apart, most in rows if not apart <= most]:
        raise MegatronLiteError(
            f"the run that was killed {options.kills} times is not the one that was not: {', '.join(wrong)} "
            f"{'differ' if len(wrong) > 1 else 'differs'}"
        )
    sameness = "to the last bit" if exact else f"within {tolerance:g} in another layout"
    print(f"\nkilled {options.kills} times, the run is the same {sameness}", flush=True)


def _records(folder: Path) -> dict[int, dict]:
    """The record of each step. Raises MegatronLiteError for a step that is there twice."""
    found: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["step"] in found:
            raise MegatronLiteError(f"{folder.name}: metrics.jsonl has step {record['step']} twice")
        found[record["step"]] = record
    return found


def _apart(here: float | None, there: float | None) -> float:
    """How far two numbers are apart, relative to the second; infinite where only one is there or finite."""
    if here == there:
        return 0.0
    if here is None or there is None or not (math.isfinite(here) and math.isfinite(there)):
        return math.inf
    return abs(here - there) / (abs(there) or 1.0)


def _state_rows(broken: Path, unbroken: Path, step: int, tolerance: float) -> list[tuple[str, int, float, float]]:
    """A row for the weights and for each slot of the optimizer, and one for the plain values of a checkpoint."""
    import torch

    from megatron_lite.checkpoint.load import read_tensor

    ours, reference = (folder / store.step_name(step) for folder in (broken, unbroken))
    here, there = read_manifest(ours), read_manifest(reference)
    apart: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    odd = here.tensors.keys() ^ there.tensors.keys()
    for name in sorted(here.tensors.keys() & there.tensors.keys()):
        kind = name.partition("/")[0]
        left, right = read_tensor(ours, name), read_tensor(reference, name)
        if torch.equal(left, right):
            distance = 0.0
        else:
            distance = (left.double() - right.double()).norm().item()
        apart.setdefault(kind, []).append(distance)
        sizes.setdefault(kind, []).append(right.double().norm().item())
    rows = []
    for kind, distances in apart.items():
        # Relative to all of its kind: a tensor that is nothing but rounding (a key's bias) has no size of its own.
        whole = math.hypot(*sizes[kind]) or 1.0
        worst = max(d / (s if s > tolerance * whole else whole) for d, s in zip(distances, sizes[kind], strict=True))
        rows.append((f"{kind} at step {step}", len(distances), worst, tolerance))
    same = {key: value for key, value in here.state.items() if key != "facts"} == {
        key: value for key, value in there.state.items() if key != "facts"
    }
    rows.append(("names of tensors", len(there.tensors), float(len(odd)), 0.0))
    rows.append(("counters, schedule, seed", 1, 0.0 if same else math.inf, 0.0))
    return rows


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool: 0 where a resumed run is the same, 1 where it is not, 2 for what cannot be asked."""

    def act(me: Launch) -> None:
        config, options = cli.load(
            sys.argv[1:] if argv is None else argv,
            VerifyOptions,
            prog="verify_resume.py",
            description="Whether a killed run goes on exactly; all flags of pretrain_gpt.py work.",
            shown=me.rank == 0,
        )
        if found := options.problems():
            raise ConfigError(found)
        if me.world_size > 1:
            raise ConfigError("start this tool as one process; it starts those that train by itself")
        verify(config, options)

    return exit_code_of(act)


if __name__ == "__main__":
    sys.exit(main())
