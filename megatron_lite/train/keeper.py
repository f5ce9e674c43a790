"""The keeper of a run's checkpoints: what goes into one, and that a failed one costs nothing else."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.checkpoint.save import save
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointNotSaved
from megatron_lite.optim.schedule import Schedule
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.build import alike
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.progress import Progress


@dataclasses.dataclass
class Keeper:
    """Saves the state of a run under `root`; does nothing without one.

    `config` is the resolved configuration and `facts` what identifies the run's data (fingerprints).
    """

    root: Path | None
    mesh: ProcessMesh
    config: RunConfig
    schedule: Schedule
    dropout_seed: int
    facts: dict[str, Any]
    versions: dict[str, Any]
    saved_step: int | None = None

    def save(
        self,
        engine: Engine,
        progress: Progress,
        *,
        is_best: bool = False,
        is_last: bool = False,
        deadline: float | None = None,
    ) -> None:
        """Write a checkpoint of this step, unless it is there already.

        `is_best` keeps this one apart from pruning. A failure is said and the run goes on; where `is_last`
        says that there is nothing to go on with, CheckpointNotSaved is raised.
        """
        if self.root is None or self.saved_step == progress.step:
            return
        began = time.perf_counter()
        optimizer = not self.config.checkpoint.no_save_optim
        try:
            with alike():
                save(
                    self.root,
                    progress.step,
                    engine.pieces(optimizer=optimizer),
                    self.state(engine, progress),
                    self.mesh,
                    layout=f"{self.mesh.shape},zero={self.config.parallel.zero_stage}",
                    config=sources.plain(self.config),
                    versions={name: _text(value) for name, value in self.versions.items()},
                    keep_last=self.config.checkpoint.keep_last,
                    best=is_best,
                    deadline=deadline,
                )
        except CheckpointNotSaved as error:
            if not is_last:
                log.warn(f"{error}; training goes on")
                return
            held = "none" if self.saved_step is None else f"that of step {self.saved_step} the newest"
            with alike():
                raise CheckpointNotSaved(f"{error}. It was the last of this run; {self.root} holds {held}") from error
        self.saved_step = progress.step
        log.note(f"saved step {progress.step} in {time.perf_counter() - began:.2f} s under {self.root}")

    def state(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return {
            "progress": progress.state(),
            "engine": engine.state(),
            "schedule": dataclasses.asdict(self.schedule),
            # Dropout draws from arithmetic seeds: this number is all there is to random state.
            "random": {"dropout_seed": self.dropout_seed},
            "facts": self.facts,
        }


def _text(version: str | list[str] | None) -> str:
    return ", ".join(version) if isinstance(version, list) else version or "not installed"
