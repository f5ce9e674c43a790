"""The run: how long, how large a batch, what is recomputed, when it stops."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length, batch, recompute, validation and stopping of a run."""

    micro_batch_size: int = 1
    """Sequences of one forward pass on one data rank."""
    global_batch_size: int | None = None
    """Sequences of one step over all data ranks; default: micro_batch_size x data size x accumulation steps."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of one step on each data rank; default: what global_batch_size leaves, or 1."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """Start, increment and samples of a linear growth to global_batch_size."""
    train_iters: int | None = None
    """Length of the run in steps."""
    train_samples: int | None = None
    """Length of the run in sequences."""
    train_tokens: int | None = None
    """Length of the run in target tokens."""
    train_epochs: float | None = None
    """Length of the run in passes over the training set."""
    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of sample numbers that are left out (after a loss spike)."""
    seed: int = 1234
    """Seed of weights, order and dropout."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none, the attention core, or whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full: every layer, in groups of recompute_num_layers ("uniform"), or the first recompute_num_layers ("block")."""
    recompute_num_layers: int = 1
    """Layers of a group or block."""
    eval_interval: int = 1000
    """Steps between validations; 0 is never."""
    eval_iters: int = 100
    """Batches of one validation."""
    check_weights_interval: int | None = None
    """Steps between comparisons of what ranks hold alike (weights; without ZeRO optimizer state too), which find memory
    or arithmetic that failed silently; a step that is saved is checked too."""
    early_stopping_patience: int | None = None
    """Stop after this many validations without a better loss."""
    exit_interval: int | None = None
    """Save and stop at a multiple of this many steps."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    exit_signal_grace_seconds: float | None = None
    """Seconds after a signal to stop at which a save is given up; default: 25 under `deepspeed` and `torchrun`, which
    kill after 30, else no limit."""

    def batch_size(self, data_size: int) -> int:
        """Sequences of one step, behind a ramp-up, over that many data ranks."""
        steps = self.gradient_accumulation_steps or 1
        return self.global_batch_size or self.micro_batch_size * data_size * steps
