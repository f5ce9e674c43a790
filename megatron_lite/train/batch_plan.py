"""The batches of a run as arithmetic: how large each step is, how many there are. No torch."""

from __future__ import annotations

import bisect
import dataclasses

from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import override
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Steps of one batch size, from a first step and sample on until the next stage."""

    first_iteration: int
    first_sample: int
    batch_size: int


def _stages(training: TrainingConfig, final_batch_size: int) -> tuple[_Stage, ...]:
    """The stages of a ramp-up: batch size start + k increment while consumed samples are in the
    k-th of equal parts of the ramp, as Megatron-LM grows it. A part that a large step jumps over
    has no stage."""
    if training.rampup_batch_size is None:
        return (_Stage(0, 0, final_batch_size),)
    start, increment, samples = training.rampup_batch_size
    parts, rest = divmod(final_batch_size - start, increment)
    assert parts > 0 and rest == 0, "config/check.py admits no such ramp-up"
    stages: list[_Stage] = []
    iteration = consumed = 0
    for part in range(parts):
        end = -(-(part + 1) * samples // parts)
        if consumed < end:
            stages.append(_Stage(iteration, consumed, start + part * increment))
            steps = -(-(end - consumed) // stages[-1].batch_size)
            iteration += steps
            consumed += steps * stages[-1].batch_size
    return (*stages, _Stage(iteration, consumed, final_batch_size))


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batch size of every step and the length of the run.

    Every step is whole: a length in samples, tokens or epochs is rounded down to full steps. What is
    planned for a step does not depend on the length of the run.
    """

    micro_batch_size: int
    data_size: int
    seq_length: int
    stages: tuple[_Stage, ...]
    total_iterations: int
    total_samples: int

    @classmethod
    def of(
        cls,
        training: TrainingConfig,
        data_size: int,
        seq_length: int,
        samples_per_epoch: int | None = None,
        available: int | None = None,
    ) -> BatchPlan:
        """The plan of a training section that `config/check.py` found sound on `data_size` data ranks.

        `samples_per_epoch` is needed when the length is given in epochs. The run ends before the data do, which
        have `available` samples (None: no end). Raises ConfigError for a run shorter than one step.
        """
        per_micro_step = training.micro_batch_size * data_size
        stages = _stages(training, training.batch_size(data_size))
        assert not any(stage.batch_size % per_micro_step for stage in stages), "config/check.py admits no such batch"
        plan = cls(training.micro_batch_size, data_size, seq_length, stages, 0, 0)
        asked = _samples_asked(training, seq_length, samples_per_epoch)
        iterations = plan.iteration_of(asked) if training.train_iters is None else training.train_iters
        if available is not None and plan.iteration_of(max(0, available)) < 1:
            raise ConfigError(
                f"The data end after {max(0, available):,} samples, which --when-exhausted, --data-max-epochs and "
                f"--skip-samples leave of them, but one step takes {stages[0].batch_size:,}; skip fewer, allow more "
                "epochs or lower the batch size."
            )
        if available is not None:
            iterations = min(iterations, plan.iteration_of(available))
            asked = available if training.train_iters is not None else min(asked, available)
        if iterations < 1:
            raise ConfigError(
                f"The run is {asked:,} samples long, but one step takes {stages[0].batch_size:,}; "
                "train longer or lower the batch size."
            )
        return dataclasses.replace(plan, total_iterations=iterations, total_samples=plan.consumed_at(iterations))

    def _stage_of_sample(self, consumed_samples: int) -> _Stage:
        return self.stages[bisect.bisect_right(self.stages, consumed_samples, key=lambda s: s.first_sample) - 1]

    def global_batch_size(self, consumed_samples: int) -> int:
        """Sequences of the step that starts after `consumed_samples`, over all data ranks."""
        return self._stage_of_sample(consumed_samples).batch_size

    def micro_batches(self, consumed_samples: int) -> int:
        """Micro-batches of that step on each data rank."""
        return self.global_batch_size(consumed_samples) // (self.micro_batch_size * self.data_size)

    def iteration_of(self, consumed_samples: int) -> int:
        """Number of whole steps in the first `consumed_samples` samples."""
        stage = self._stage_of_sample(consumed_samples)
        return stage.first_iteration + (consumed_samples - stage.first_sample) // stage.batch_size

    def consumed_at(self, iteration: int) -> int:
        """Samples consumed by the first `iteration` steps."""
        stage = self.stages[bisect.bisect_right(self.stages, iteration, key=lambda s: s.first_iteration) - 1]
        return stage.first_sample + (iteration - stage.first_iteration) * stage.batch_size

    def resolve(self, config: RunConfig, vocab_size: int) -> RunConfig:
        """`config` with what was derived filled in: a run can be started again from it alone."""
        return override(
            config,
            {
                "model": {
                    "vocab_size": vocab_size,
                    "max_position_embeddings": config.model.max_position_embeddings or config.data.seq_length,
                },
                # As a number of sequences the batch is the same on another number of ranks.
                "training": {"global_batch_size": self.stages[-1].batch_size, "gradient_accumulation_steps": None},
            },
        )

    def lines(self) -> list[str]:
        """The batch and the length of the run as sums, for the log."""
        first, last = self.stages[0], self.stages[-1]
        micro_batches = last.batch_size // (self.micro_batch_size * self.data_size)
        lines = [
            f"{last.batch_size * self.seq_length:,} tokens a step = {self.micro_batch_size:,} sequences "
            f"x {self.seq_length:,} x {self.data_size:,} data ranks x {micro_batches:,} micro-batches",
            f"{self.total_samples * self.seq_length:,} tokens in all = {self.total_samples:,} sequences "
            f"x {self.seq_length:,}, in {self.total_iterations:,} steps",
        ]
        if len(self.stages) > 1:
            lines.insert(
                1,
                f"the batch grows from {first.batch_size:,} to {last.batch_size:,} sequences over the first "
                f"{last.first_sample:,} samples = {last.first_iteration:,} steps",
            )
        return lines


def samples_of_run(training: TrainingConfig, data_size: int, seq_length: int) -> int | None:
    """The length of a run in samples as it is configured; None where it is not, or in epochs of data not opened yet."""
    if training.train_iters is None and training.train_samples is None and training.train_tokens is None:
        return None
    return BatchPlan.of(training, data_size, seq_length).total_samples


def _samples_asked(training: TrainingConfig, seq_length: int, samples_per_epoch: int | None) -> int:
    """The length of the run in samples, before rounding to steps; 0 for a length in iterations.

    Samples and tokens may both be given, as to Megatron-DeepSpeed: the run ends at what comes first.
    """
    if training.train_epochs is not None:
        assert samples_per_epoch is not None, "a length in epochs needs the number of samples of one"
        return int(training.train_epochs * samples_per_epoch)
    in_tokens = None if training.train_tokens is None else training.train_tokens // seq_length
    return min((given for given in (training.train_samples, in_tokens) if given is not None), default=0)
