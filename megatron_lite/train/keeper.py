"""The keeper of a run's checkpoints: what goes into one, saving beside training, and what a failure costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.checkpoint.background import Background
from megatron_lite.checkpoint.host_copies import Copying, HostCopies
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.ranks import Ranks
from megatron_lite.checkpoint.remote import RemoteCopies
from megatron_lite.checkpoint.save import save
from megatron_lite.checkpoint.store import Claim
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointNotSaved, HangError, MegatronLiteError
from megatron_lite.optim.schedule import Schedule
from megatron_lite.parallel.launch import GRACE_SECONDS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.build import alike
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.progress import Progress

Deadline = Callable[[], float | None]

_LOOK_SECONDS = 0.2
"""How often ranks that wait for a save tell one another that they are still there."""


@dataclasses.dataclass
class _InFlight:
    """A save on its way."""

    step: int
    work: Background[Path]
    copying: Copying
    began: float
    blocked: float
    """Seconds the loop has waited for it."""


class Keeper:
    """Saves the state of a run under `root`; does nothing without one.

    `config` is the resolved configuration, `facts` what identifies its data (fingerprints) and its family, `stretches`
    what its steps were trained on. Made on all ranks at once, as it makes a group of its own for saves in the
    background; all its methods are called on all of them at the same step, but `allow_change` and `let_end`.
    """

    def __init__(
        self,
        root: Path | None,
        claim: Claim | None,
        mesh: ProcessMesh,
        config: RunConfig,
        schedule: Schedule,
        dropout_seed: int,
        facts: dict[str, Any],
        stretches: list[dict[str, Any]],
        versions: dict[str, Any],
        saved_step: int | None = None,
        remote: RemoteCopies | None = None,
    ):
        self.root = root
        #: The newest step that is published and durable.
        self.saved_step = saved_step
        self._claim = claim
        self._mesh = mesh
        self._config = config
        self._schedule = schedule
        self._dropout_seed = dropout_seed
        self._facts = facts
        self._stretches = stretches
        self._versions = versions
        self._in_background = config.checkpoint.async_save
        self._exchange = mesh.make_exchange() if root is not None and self._in_background else None
        self._remote = remote
        self._copies: HostCopies | None = None
        self._in_flight: _InFlight | None = None

    def save(
        self,
        engine: Engine,
        progress: Progress,
        *,
        is_last: bool = False,
        deadline: Deadline = lambda: None,
    ) -> None:
        """Save this step, unless it is saved already, once the save before is over.

        In the background, if that is asked for: `allow_change` is then to be called before the next optimizer step.
        The best validated step is kept apart from pruning. A failure is said and the run goes on; where `is_last` says
        that there is nothing to go on with, the step is saved on return, or CheckpointNotSaved is raised.
        """
        step = progress.step
        if self.root is None or self.saved_step == step:
            return
        if self._in_flight is not None and (is_last or self._in_flight.step != step):
            self._wait()
        if self.saved_step == step or self._in_flight is not None:
            return
        began = time.perf_counter()
        pieces = functools.partial(engine.pieces, optimizer=not self._config.checkpoint.no_save_optim)
        write = self._writer(step, self._state(engine, progress), progress.best_step, deadline)
        if not is_last and self._has_copies(pieces):
            copying = self._copies.begin(pieces)
            work = Background(f"save of step {step}", lambda: write(copying.finish(), self._exchange))
            self._in_flight = _InFlight(step, work, copying, began, time.perf_counter() - began)
            return
        with self._cost(step, is_last):
            write(pieces(), self._mesh)
            self._note_saved(step, f"in {time.perf_counter() - began:.2f} s")

    def allow_change(self) -> None:
        """Return when weights and optimizer state may change: when a save in the background has its copy of them."""
        if self._in_flight is not None:
            began = time.perf_counter()
            self._in_flight.copying.allow_change()
            self._in_flight.blocked += time.perf_counter() - began

    @property
    def has_ended(self) -> bool:
        """A save in the background is over on this rank. `settle` is to be called once it is over on all."""
        return self._in_flight is not None and self._in_flight.work.is_done

    def settle(self) -> None:
        """Say how the save in the background went. Raises, on all ranks alike, what the run cannot go on with."""
        flight, self._in_flight = self._in_flight, None
        with self._cost(flight.step, is_last=False):
            flight.work.result()
            durable = flight.work.ended - flight.began
            self._note_saved(flight.step, f"in {durable:.2f} s, of which training waited {flight.blocked:.3f} s")

    def let_end(self, error: Exception) -> None:
        """Give a save in the background the time to end when `error` ends the run."""
        with contextlib.suppress(Exception):
            if self._in_flight is None:
                return
            if getattr(error, "on_all_ranks", False):
                self._wait()
            elif self._in_flight.work.wait(GRACE_SECONDS):
                self.settle()

    def _wait(self) -> None:
        """Wait until the save in the background is over on all ranks, and settle it.

        Ranks meet again and again meanwhile, so that one that is lost is missed, and one whose disk does not
        answer is not waited for longer than the others' patience lasts.
        """
        began, flight = time.perf_counter(), self._in_flight
        done = broken = 0.0
        while done < self._mesh.world_size and not broken:
            is_done = flight.work.wait(_LOOK_SECONDS)
            is_broken = is_done and not isinstance(flight.work.error, (MegatronLiteError, type(None)))
            done, broken = self._mesh.sum_numbers([is_done, is_broken])
        flight.blocked += time.perf_counter() - began
        if not flight.work.is_done:
            raise HangError(f"the save of step {flight.step} does not end on rank {self._mesh.global_rank}")
        self.settle()

    def _has_copies(self, pieces: Callable[[], list[Piece]]) -> bool:
        """Whether saves run in the background: there is memory for the copies, on all ranks."""
        if self._in_background and self._copies is None:
            with contextlib.suppress(RuntimeError):
                self._copies = HostCopies(pieces())
            held, *_ = self._mesh.sum_numbers([self._copies is not None])
            self._in_background = held == self._mesh.world_size
            if self._in_background:
                size = f"{self._copies.nbytes / 1e9:.3f} GB of host memory on rank 0"
                log.note(f"saves run beside training (--async-save), from a copy that takes {size}")
            else:
                self._copies = None
                log.warn("not every rank has the host memory to copy a checkpoint to: each save stops training")
        return self._in_background

    def _writer(
        self, step: int, state: dict[str, Any], best_step: int | None, deadline: Deadline
    ) -> Callable[[list[Piece], Ranks], Path]:
        options = self._config.checkpoint

        def write(pieces: list[Piece], ranks: Ranks) -> Path:
            folder = save(
                self.root,
                step,
                pieces,
                state,
                ranks,
                layout=f"{self._mesh.shape},zero={self._config.parallel.zero_stage}",
                config=sources.plain(self._config),
                versions={name: _text(value) for name, value in self._versions.items()},
                claim=self._claim,
                keep_last=options.keep_last,
                keep_every=options.keep_every,
                best_step=best_step,
                deadline=deadline,
            )
            if self._remote is not None:
                self._remote.send(folder, ranks, options.keep_last, options.keep_every, best_step, deadline)
            return folder

        return write

    @contextlib.contextmanager
    def _cost(self, step: int, is_last: bool):
        """What a save that fails costs: itself alone, unless it is the last."""
        try:
            with alike():
                yield
        except CheckpointNotSaved as error:
            if not is_last:
                log.warn(f"{error}; training goes on")
                return
            held = "none" if self.saved_step is None else f"that of step {self.saved_step} the newest"
            with alike():
                raise CheckpointNotSaved(f"{error}. It was the last of this run; {self.root} holds {held}") from error

    def _note_saved(self, step: int, how: str) -> None:
        self.saved_step = step
        log.note(f"saved step {step} {how} under {self.root}")

    def _state(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return {
            "progress": progress.state(),
            "engine": engine.state(),
            "schedule": dataclasses.asdict(self._schedule),
            # Dropout draws from arithmetic seeds: this number is all there is to random state.
            "random": {"dropout_seed": self._dropout_seed},
            "facts": self._facts,
            "stretches": self._stretches,
        }


def _text(version: str | list[str] | None) -> str:
    return ", ".join(version) if isinstance(version, list) else version or "not installed"
