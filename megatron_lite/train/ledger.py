"""The sample ledger: which samples a step trains on, by arithmetic between checkpoints. No logs, no torch."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import FILE_NAME, read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.train.stretches import Stretch, batches_of, consumed_at, stretches_in


@dataclasses.dataclass(frozen=True)
class Landmark:
    """A moment of a run that a checkpoint holds: how far it was and how it was configured until then."""

    folder: Path
    step: int
    consumed_samples: int
    config: RunConfig
    fingerprints: dict[str, str | None]
    """Those of "train_data", "valid_data" and "tokenizer"."""
    stretches: list[Stretch]


@dataclasses.dataclass(frozen=True)
class StepSamples:
    """The samples of one step: `count` of them after `consumed_samples` others."""

    step: int
    consumed_samples: int
    count: int
    skip_samples: tuple[str, ...]
    """Ranges of samples that were left out."""
    landmark: Landmark
    """A checkpoint of the data that the step was, or will be, trained on."""


class Ledger:
    """What the checkpoints under a run's --save folder, or in the folder of one, say of any step of the run.

    The newest one tells it. Of before its stretches began, a step between two checkpoints is told by the later one, for
    a run that is started anew goes on from the earlier one. Raises CheckpointError for a folder without checkpoints.
    """

    def __init__(self, root: Path):
        self._root = root
        self._folders = {read_manifest(root).step: root} if (root / FILE_NAME).exists() else store.steps(root)
        if not self._folders:
            raise CheckpointError(f"{root} holds no checkpoint; give the --save folder of a run")
        # A manifest of many tensors takes a while to read.
        self._landmark = functools.cache(self._read)

    @property
    def newest_step(self) -> int:
        return max(self._folders)

    def of_step(self, step: int) -> StepSamples:
        """The samples that `step`, from 1, trains on. A step behind the newest checkpoint is answered by its
        configuration.

        Raises ConfigError for step 0, CheckpointError where the data were others, or the batch size of a checkpoint
        without stretches, and no checkpoint of that time is there.
        """
        if step < 1:
            raise ConfigError(f"step={step}: steps are counted from 1")
        newest = self._landmark(self.newest_step)
        stretch = next((each for each in reversed(newest.stretches) if each.step < step), None)
        if stretch is None:
            return self._by_checkpoints(step, newest)
        consumed = consumed_at(stretch.plan, stretch.step, stretch.consumed_samples, step - 1)
        return StepSamples(
            step,
            consumed,
            stretch.plan.global_batch_size(consumed),
            stretch.skip_samples,
            self._landmark_of_data(stretch, step, newest),
        )

    def _landmark_of_data(self, stretch: Stretch, step: int, newest: Landmark) -> Landmark:
        """The newest checkpoint whose configuration is of the data of a stretch."""
        for landmark in map(self._landmark, reversed(self._folders)):
            if landmark.fingerprints.get("train_data") == stretch.train_data:
                return landmark
        changed = next((each.step for each in newest.stretches if each.step > stretch.step), newest.step)
        raise CheckpointError(
            f"step {step} was trained on other data than those of the checkpoints under {self._root}: "
            f"{stretch.data_path} (fingerprint {stretch.train_data[:12]}); give the folder of the run that trained it, "
            f"or ask for a step from {changed + 1} on"
        )

    def _by_checkpoints(self, step: int, newest: Landmark) -> StepSamples:
        """The samples of a step by checkpoints of before stretches were recorded: those around it tell."""
        end = self._landmark(min((at for at in self._folders if at >= step), default=newest.step))
        if end.stretches and end.stretches[0].step >= step:
            raise CheckpointError(
                f"what step {step} was trained on is not known: {end.folder} tells it from step "
                f"{end.stretches[0].step + 1} on, and no checkpoint of before is there"
            )
        earlier = max((at for at in self._folders if at < step), default=None)
        begin = None if earlier is None else self._landmark(earlier)
        plan = batches_of(end.config)
        begun = (0, 0) if begin is None else (begin.step, begin.consumed_samples)
        by_plan = consumed_at(plan, *begun, end.step)
        if by_plan != end.consumed_samples:
            known = "the beginning" if begin is None else f"step {begin.step}"
            raise CheckpointError(
                f"{end.folder} had consumed {end.consumed_samples:,} samples, where its batch size gives {by_plan:,} "
                f"from {known} on: the batch size changed at a checkpoint that is no longer there; ask for a step "
                f"from {end.step + 1} on"
            )
        consumed = consumed_at(plan, *begun, step - 1)
        return StepSamples(step, consumed, plan.global_batch_size(consumed), end.config.training.skip_samples, end)

    def _read(self, step: int) -> Landmark:
        folder = self._folders[step]
        manifest = read_manifest(folder)
        progress = manifest.state.get("progress")
        if progress is None:
            raise CheckpointError(f"{folder} does not say how many samples were consumed: it is of no training run")
        return Landmark(
            folder,
            manifest.step,
            progress["consumed_samples"],
            sources.from_plain(manifest.config, str(folder)),
            dict(manifest.state.get("facts", {})),
            stretches_in(manifest.state, str(folder)),
        )
