"""What reading the samples costs the training."""

from __future__ import annotations

import collections

from megatron_lite import log

STEPS = 50
"""Steps that are looked back on."""
MUCH = 0.2
"""Share of their time from which training is said to wait for its data."""


class DataWait:
    """The share of each step's time in which samples were waited for; says once when it stays high."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._last: collections.deque[tuple[float, float]] = collections.deque(maxlen=STEPS)
        self._has_said = False

    def share(self, waited: float, seconds: float) -> float:
        """The share of a step of `seconds` that began with `waited` of them for its samples."""
        self._last.append((waited, seconds))
        if len(self._last) == STEPS and not self._has_said:
            over_all = sum(waited for waited, _ in self._last) / sum(seconds for _, seconds in self._last)
            if over_all >= MUCH:
                self._has_said = True
                log.warn(
                    f"the data are slower than the training, which waited for samples for {over_all:.0%} of the last "
                    f"{STEPS} steps: {self._way_out()}"
                )
        return waited / seconds

    def _way_out(self) -> str:
        if not self._num_workers:
            return "give --num-workers 2, processes that read ahead"
        return f"give more --num-workers than {self._num_workers}, or put the data on a faster disk"
