"""The learning rate as a pure function of how far the run is."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megatron_lite.config.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning-rate curve: linear warm-up, decay of some style, floor.

    `warmup` and `decay` are lengths from the start of the run, in `unit`.
    """

    style: Literal["constant", "linear", "cosine", "inverse-square-root", "vaswani"]
    unit: Literal["iterations", "samples"]
    start: float
    peak: float
    floor: float
    warmup: float
    decay: float
    hidden_size: int

    def learning_rate(self, iteration: int, consumed_samples: int) -> float:
        """The rate of the step that follows `iteration` steps and `consumed_samples` samples.

        As Megatron-LM and transformers count: the first step of a warm-up has the start rate.
        """
        done = iteration if self.unit == "iterations" else consumed_samples
        if self.style == "vaswani":
            return self._vaswani(done + 1)
        if done <= self.warmup and self.warmup > 0:
            return self.start + (self.peak - self.start) * done / self.warmup
        if self.style == "constant":
            return self.peak
        if done > self.decay:
            return self.floor
        if self.style == "inverse-square-root":
            return max(self.floor, self.peak * math.sqrt(max(self.warmup, 1) / max(done, 1)))
        passed = (done - self.warmup) / max(self.decay - self.warmup, 1)
        left = 1 - passed if self.style == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.floor + (self.peak - self.floor) * left

    def shortfall(self, total_iterations: int, total_samples: int) -> str | None:
        """What to say of a run of that length which ends before the warm-up does; None for any other."""
        total = total_iterations if self.unit == "iterations" else total_samples
        if self.warmup <= total:
            return None
        last = self.learning_rate(total_iterations - 1, total_samples * (total_iterations - 1) // total_iterations)
        return (
            f"the warm-up is {self.warmup:,.0f} {self.unit} and the run {total:,}: the learning rate ends at "
            f"{last:.3g} and never reaches its peak; shorten the warm-up or lengthen the run"
        )

    def _vaswani(self, step: int) -> float:
        """Vaswani et al. 2017, section 5.3; the floor holds after the warm-up alone."""
        scale = self.peak / math.sqrt(self.hidden_size)
        if step < self.warmup:
            return scale * step / self.warmup**1.5
        return max(self.floor, scale / math.sqrt(step))


def schedule(config: OptimizerConfig, total_iterations: int, total_samples: int, hidden_size: int) -> Schedule:
    """The learning-rate curve of a run of that length.

    Lengths are in samples if any is given in samples, else in iterations; the decay ends with the run
    unless given, and a warm-up fraction is one of the decay. `hidden_size` is used by "vaswani" alone.
    """
    in_samples = config.lr_decay_samples is not None or config.lr_warmup_samples > 0
    if in_samples:
        decay = total_samples if config.lr_decay_samples is None else config.lr_decay_samples
        warmup: float = config.lr_warmup_samples
    else:
        decay = total_iterations if config.lr_decay_iters is None else config.lr_decay_iters
        warmup = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * decay
    return Schedule(
        style=config.lr_decay_style,
        unit="samples" if in_samples else "iterations",
        start=config.lr_warmup_init,
        peak=config.lr,
        floor=config.min_lr,
        warmup=warmup,
        decay=decay,
        hidden_size=hidden_size,
    )
