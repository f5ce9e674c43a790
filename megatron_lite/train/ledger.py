"""The sample ledger: which samples a step trains on, by arithmetic between checkpoints. No logs, no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.train.batch_plan import BatchPlan


@dataclasses.dataclass(frozen=True)
class Landmark:
    """A moment of a run that a checkpoint holds: how far it was and how it was configured until then."""

    folder: Path
    step: int
    consumed_samples: int
    config: RunConfig
    fingerprints: dict[str, str | None]
    """Those of "train_data", "valid_data" and "tokenizer"."""


@dataclasses.dataclass(frozen=True)
class StepSamples:
    """The samples of one step: `count` of them after `consumed_samples` others."""

    step: int
    consumed_samples: int
    count: int
    landmark: Landmark
    """The checkpoint whose configuration the step was, or will be, trained with."""


class Ledger:
    """What the checkpoints under a run's --save folder say of any of its steps.

    A step between two checkpoints was trained with the later one's configuration, for a run that is
    started anew goes on from the earlier one. Raises CheckpointError for a folder without checkpoints.
    """

    def __init__(self, root: Path):
        self._root = root
        self._folders = store.steps(root)
        if not self._folders:
            raise CheckpointError(f"{root} holds no checkpoint; give the --save folder of a run")

    @property
    def newest_step(self) -> int:
        return max(self._folders)

    def of_step(self, step: int) -> StepSamples:
        """The samples that `step`, from 1, trains on. A step behind the newest checkpoint is answered by its
        configuration.

        Raises ConfigError for step 0, CheckpointError where the batch size changed at a checkpoint
        that is no longer there.
        """
        if step < 1:
            raise ConfigError(f"step={step}: steps are counted from 1")
        earlier = max((at for at in self._folders if at < step), default=None)
        later = min((at for at in self._folders if at >= step), default=None)
        begin = None if earlier is None else self._landmark(earlier)
        end = None if later is None else self._landmark(later)
        trained_by = end or begin
        plan = _plan_of(trained_by.config)
        begun = (0, 0) if begin is None else (begin.step, begin.consumed_samples)
        if end is not None and (by_plan := _consumed_at(plan, *begun, end.step)) != end.consumed_samples:
            known = "the beginning" if begin is None else f"step {begin.step}"
            raise CheckpointError(
                f"{end.folder} had consumed {end.consumed_samples:,} samples, where its batch size gives {by_plan:,} "
                f"from {known} on: the batch size changed at a checkpoint that is no longer there; ask for a step "
                f"from {end.step + 1} on"
            )
        consumed = _consumed_at(plan, *begun, step - 1)
        return StepSamples(step, consumed, plan.global_batch_size(consumed), trained_by)

    def _landmark(self, step: int) -> Landmark:
        folder = self._folders[step]
        manifest = read_manifest(folder)
        progress = manifest.state.get("progress")
        if progress is None:
            raise CheckpointError(f"{folder} does not say how many samples were consumed: it is of no training run")
        config = sources.from_plain(manifest.config, str(folder))
        return Landmark(
            folder, manifest.step, progress["consumed_samples"], config, dict(manifest.state.get("facts", {}))
        )


def _plan_of(config: RunConfig) -> BatchPlan:
    # What a step takes depends neither on the length of the run nor on the ranks that share it.
    training = dataclasses.replace(
        config.training, train_iters=1, train_samples=None, train_tokens=None, train_epochs=None, micro_batch_size=1
    )
    return BatchPlan.of(training, 1, config.data.seq_length)


def _consumed_at(plan: BatchPlan, step: int, consumed: int, until: int) -> int:
    """Samples consumed by the first `until` steps, `consumed` of them by the first `step`."""
    last = plan.stages[-1]
    while step < until and consumed < last.first_sample:
        consumed += plan.global_batch_size(consumed)
        step += 1
    return consumed + (until - step) * last.batch_size
