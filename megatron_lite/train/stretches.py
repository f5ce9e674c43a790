"""The stretches of a run: from which step on it trained on which data, in which order and batches. No torch.

Every checkpoint holds those of its run until then. So what a step was fed is known, or known not to be known, when the
checkpoints of its time are gone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.train.batch_plan import BatchPlan
from megatron_lite.train.progress import Progress

_SETTINGS = ("global_batch_size", "rampup_batch_size", "skip_samples")
"""Of the training section: what, beside the data, says which samples a step takes."""
_SHOWN_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps that chose their samples alike, up to where the next one begins."""

    step: int
    """Steps done when it began."""
    consumed_samples: int
    """Samples consumed then."""
    train_data: str
    """Fingerprint of the data and their order."""
    data_path: str
    """What the data were called."""
    training: dict[str, Any]
    """Plain settings of the training section."""

    @property
    def chooses_by(self) -> tuple[str, dict[str, Any]]:
        """What is the same in two that take the same samples in the same steps."""
        return self.train_data, self.training

    @property
    def plan(self) -> BatchPlan:
        """The batches of its steps."""
        return batches_of(sources.from_plain({"training": self.training}, "stretches"))

    @property
    def skip_samples(self) -> tuple[str, ...]:
        """Ranges of samples that it left out."""
        return tuple(self.training["skip_samples"])


def batches_of(config: RunConfig) -> BatchPlan:
    """How large the steps of a run are, which depends neither on its length nor on the ranks that share them."""
    training = dataclasses.replace(
        config.training, train_iters=1, train_samples=None, train_tokens=None, train_epochs=None, micro_batch_size=1
    )
    return BatchPlan.of(training, 1, config.data.seq_length)


def consumed_at(plan: BatchPlan, step: int, consumed: int, until: int) -> int:
    """Samples consumed by the first `until` steps, `consumed` of them by the first `step`."""
    last = plan.stages[-1]
    while step < until and consumed < last.first_sample:
        consumed += plan.global_batch_size(consumed)
        step += 1
    return consumed + (until - step) * last.batch_size


def continued(state: dict[str, Any], progress: Progress, config: RunConfig, train_data: str) -> list[dict[str, Any]]:
    """The plain stretches of a run that goes on from the checkpoint of `state` (nothing: begins) with data of this
    fingerprint, by a resolved `config`."""
    data, training = (sources.plain(config)[section] for section in ("data", "training"))
    path = "mock data" if data["mock_data"] else " ".join(data["train_data_path"] or data["data_path"])
    now = Stretch(
        progress.step,
        progress.consumed_samples,
        train_data,
        path if len(path) <= _SHOWN_CHARACTERS else f"{path[: _SHOWN_CHARACTERS - 3]}...",
        {name: training[name] for name in _SETTINGS},
    )
    before = stretches_in(state, "the checkpoint to go on from")
    if not before and _is_of_one_stretch(state, now):
        # It is of before they were recorded.
        before = [dataclasses.replace(now, step=0, consumed_samples=0)]
    # One that is no step long was left before its first.
    kept = [stretch for stretch in before if stretch.step < max(1, now.step)]
    if not kept or kept[-1].chooses_by != now.chooses_by:
        kept = [*(stretch for stretch in kept if stretch.step < now.step), now]
    return [dataclasses.asdict(stretch) for stretch in kept]


def _is_of_one_stretch(state: dict[str, Any], now: Stretch) -> bool:
    """Whether a checkpoint without stretches says nothing against a run that was the same from its beginning on."""
    same_data = state.get("facts", {}).get("train_data") == now.train_data
    return same_data and consumed_at(now.plan, 0, 0, now.step) == now.consumed_samples


def stretches_in(state: dict[str, Any], where: str) -> list[Stretch]:
    """Those in the state of a checkpoint, oldest first; none in one of before they were recorded.

    Raises CheckpointError, naming `where`.
    """
    try:
        found = [Stretch(**kept) for kept in state.get("stretches", [])]
        for stretch in found:
            if not isinstance(stretch.training, dict):
                raise TypeError(f"training is {stretch.training!r}")
            consumed_at(stretch.plan, stretch.step, stretch.consumed_samples, stretch.step + 1)
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{where}: its stretches cannot be read: {error}") from None
    return found
