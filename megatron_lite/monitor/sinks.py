"""Where metrics go: console, metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 alone has sinks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_lite import log
from megatron_lite.config.logging import LoggingConfig
from megatron_lite.credentials import without_credentials
from megatron_lite.errors import ConfigError, UserError
from megatron_lite.monitor.console import ConsoleSink
from megatron_lite.monitor.histograms import Histogram
from megatron_lite.monitor.history import JsonLinesSink, Record
from megatron_lite.publish import publish


class Sink(Protocol):
    """Something that takes the record of a step. A failure is an exception of `write`."""

    def write(self, record: Record) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All sinks of a run. One that fails (a full disk, a lost network) is reported, once, and tried
    again at the next record; the run goes on."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = list(sinks)
        self._lost: dict[Sink, int] = {}

    def write(self, record: Record) -> None:
        """Hand `record`, which has a `step`, to every sink."""
        for sink in self._sinks:
            if not self._attempt(sink, sink.write, record):
                self._lost[sink] = self._lost.get(sink, 0) + 1
            elif sink in self._lost:
                log.note(f"{type(sink).__name__} works again; {self._lost.pop(sink)} records are missing in it")

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        """Hand histograms by tag to the sinks that show them."""
        for sink in self._sinks:
            if isinstance(sink, TensorBoardSink):
                self._attempt(sink, sink.histograms, step, found)

    def flush(self) -> None:
        """Bring everything to disk, as before a checkpoint is published."""
        for sink in self._sinks:
            self._attempt(sink, sink.flush)

    def close(self) -> None:
        for sink in self._sinks:
            self._attempt(sink, sink.close)

    def _attempt(self, sink: Sink, action, *arguments: Any) -> bool:
        try:
            action(*arguments)
        except Exception as error:
            if sink not in self._lost:
                log.warn(f"{type(sink).__name__} failed ({type(error).__name__}: {error}); training goes on without it")
                self._lost[sink] = 0
            return False
        return True


def open_sinks(
    config: LoggingConfig,
    run_dir: str | os.PathLike | None,
    *,
    rank: int,
    world_size: int,
    total_steps: int,
    resume_step: int = 0,
    settings: dict[str, Any] | None = None,
) -> Sinks:
    """The sinks `config` asks for, none on ranks other than 0.

    `run_dir` None leaves the console alone. `settings` is the resolved configuration, shown by
    Weights & Biases. Raises ConfigError where Weights & Biases is asked for and not installed,
    UserError where the folder cannot be written.
    """
    if rank != 0:
        return Sinks()
    sinks: list[Sink] = [
        ConsoleSink(total_steps, log_interval=config.log_interval, resume_step=resume_step, world_size=world_size)
    ]
    if run_dir is not None:
        try:
            sinks += _open_files(config, Path(run_dir), resume_step, settings)
        except OSError as error:
            raise UserError(
                f"the run folder {run_dir} cannot be written ({error}); choose another by --run-dir"
            ) from None
    return Sinks(sinks)


def _open_files(config: LoggingConfig, folder: Path, resume_step: int, settings: dict[str, Any] | None) -> list[Sink]:
    sinks: list[Sink] = [JsonLinesSink(folder / "metrics.jsonl", resume_step)]
    if config.tensorboard_dir != "none":
        events = Path(config.tensorboard_dir or folder / "tensorboard")
        try:
            sinks.append(TensorBoardSink(events, resume_step))
        except OSError as error:
            raise UserError(
                f"TensorBoard events cannot be written to {events} ({error}); choose another folder by "
                "--tensorboard-dir, or none"
            ) from None
        except ImportError:
            log.once("tensorboard is not installed: metrics.jsonl alone is written (pip install tensorboard)")
    if config.wandb_project:
        sinks.append(WandbSink(config, folder, resume_step, settings))
    return sinks


class TensorBoardSink:
    """Scalars and histograms as TensorBoard events.

    A resumed run writes a new event file whose start mark makes readers drop what earlier files
    hold after `resume_step`. Raises ImportError without the tensorboard package.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(os.fspath(folder), purge_step=resume_step + 1, flush_secs=10)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def histograms(self, step: int, found: dict[str, Histogram]) -> None:
        for tag, histogram in found.items():
            self._writer.add_histogram_raw(tag, **dataclasses.asdict(histogram), global_step=step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Records as the history of one Weights & Biases run, whose id is kept in the run folder.

    `WANDB_MODE=offline` needs no network. The service does not rewrite a step it has: after going
    back to an earlier checkpoint the first values stay, which the log says.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        resume_step: int = 0,
        settings: dict[str, Any] | None = None,
    ):
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"wandb_project={config.wandb_project!r} needs the Weights & Biases package, which is not installed; "
                f"pip install wandb, or leave --wandb-project out"
            ) from None
        self._state = run_dir / "wandb.json"
        known = json.loads(self._state.read_text()) if resume_step and self._state.exists() else {}
        self._id = known.get("id") or uuid.uuid4().hex[:12]
        self._last = known.get("step", 0)
        if self._last > resume_step:
            log.warn(f"Weights & Biases keeps its values of steps {resume_step + 1} to {self._last} of run {self._id}")
        with _arguments_without_credentials():
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name,
                dir=config.wandb_save_dir or os.fspath(run_dir),
                id=self._id,
                resume="allow",
                config=settings or {},
            )
        self._keep()

    def _keep(self) -> None:
        publish(self._state, json.dumps({"id": self._id, "step": self._last}))

    def write(self, record: Record) -> None:
        step = int(record["step"])
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=step)
        self._last = max(self._last, step)

    def flush(self) -> None:
        self._keep()

    def close(self) -> None:
        self._keep()
        self._run.finish()


@contextlib.contextmanager
def _arguments_without_credentials() -> Iterator[None]:
    """Within it, this process's command line has none: Weights & Biases takes it along."""
    before = sys.argv
    sys.argv = list(map(without_credentials, before))
    try:
        yield
    finally:
        sys.argv = before
