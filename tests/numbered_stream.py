"""A stream whose samples say their numbers, for processes too, which find it by its name."""

from __future__ import annotations

import time

import numpy as np

from megatron_lite.data.sample import Sample

SEQ = 6


class Numbered:
    """Sample k is k, k + 1, ... in k mod 4 + 1 documents, the token behind each of which does not count.

    `bad` raises `error`; `stuck` is never done.
    """

    samples_per_epoch = 1000

    def __init__(self, bad: int | None = None, error: Exception | None = None, stuck: int | None = None):
        self.bad, self.error, self.stuck = bad, error, stuck
        self.read: list[int] = []

    def __getitem__(self, sample: int) -> Sample:
        self.read.append(sample)
        if sample == self.stuck:
            time.sleep(1000)
        if sample == self.bad:
            raise self.error
        starts = np.arange(sample % 4 + 1)
        counts = np.ones(SEQ + 1, np.bool_)
        counts[starts] = False
        return Sample(np.arange(sample, sample + SEQ + 1, dtype="<u2"), starts, counts if sample % 3 else None)
