"""Short sequences first: how long they are is arithmetic on the samples consumed. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megatron_lite.config.data import DataConfig


@dataclasses.dataclass(frozen=True)
class LengthCurriculum:
    """The length of sequences, from `first` tokens on, until after `samples` sequences it is `full`.

    A shorter sequence is a piece of one of `full` tokens, so no token is left out and shapes stay as they are.
    "linear" and "root" grow by whole `step`s, in proportion to the samples consumed or to the `root`-th root of them;
    "step" doubles the length, and keeps each for as many samples. Li et al. 2022, with DeepSpeed's schedules.
    """

    first: int
    full: int
    samples: int
    schedule: Literal["linear", "root", "step"] = "linear"
    step: int = 8
    root: int = 2

    @classmethod
    def of(cls, data: DataConfig) -> LengthCurriculum | None:
        """That of a configuration which `rules.problems` found sound; None where sequences are whole from the start."""
        if data.curriculum_seq_length_min is None:
            return None
        return cls(
            data.curriculum_seq_length_min,
            data.seq_length,
            data.curriculum_seq_length_samples,
            data.curriculum_seq_length_schedule,
            data.curriculum_seq_length_step,
            data.curriculum_seq_length_root,
        )

    def length(self, consumed_samples: int) -> int:
        """Tokens of a sequence in the step that begins after so many samples."""
        if consumed_samples >= self.samples:
            return self.full
        if self.schedule == "step":
            doublings = (-(-self.full // self.first) - 1).bit_length()
            return self.first << consumed_samples * doublings // self.samples
        degree = self.root if self.schedule == "root" else 1
        # In integers: a rounded power could put the same step on either side of a length.
        grown = _root((self.full - self.first) ** degree * consumed_samples // self.samples, degree)
        return self.first + grown // self.step * self.step

    def describe(self) -> str:
        """A line for the log."""
        return (
            f"sequences are {self.first:,} tokens long at first and {self.full:,} after {self.samples:,} samples "
            f"({self.schedule}): the samples are divided, and no token is left out"
        )


def _root(number: int, degree: int) -> int:
    """The whole part of the `degree`-th root."""
    if degree == 1:
        return number
    if degree == 2:
        return math.isqrt(number)
    low, high = 0, 1 << -(-number.bit_length() // degree)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low
