"""Which rank is slow: the time each of them computes, without what it waits for others."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from megatron_lite import log
from megatron_lite.parallel.whereabouts import HERE

LEAST_STEPS = 10
"""Steps between two reports."""
SLOW = 1.2
"""Times the median from which a rank is slow, if it stays so for `TIMES` reports."""
TIMES = 3


class Pace:
    """The time of this rank's forward and backward passes, set beside that of the others once in a while.

    `peers` tells for each rank which others do the same work, by the same value: the ranks of a pipeline's stage.
    `gather` gives a number of every rank, in order, on every rank.
    """

    def __init__(self, peers: Sequence[Hashable], gather: Callable[[float], Sequence[float]], interval: int):
        self._gather, self._interval = gather, max(interval, LEAST_STEPS)
        ranks: dict[Hashable, list[int]] = defaultdict(list)
        for rank, place in enumerate(peers):
            ranks[place].append(rank)
        # Where each rank has work of its own there is nothing better than all of them.
        self._groups = list(ranks.values()) if len(ranks) < len(peers) else [list(range(len(peers)))]
        self._steps, self._seconds = 0, 0.0
        self._slow_before: dict[int, int] = {}

    def metrics(self, step: int) -> dict[str, float]:
        """The slowest rank since the last report, where one is due. All ranks call, after every step."""
        self._steps += 1
        self._seconds += HERE.take_computed()
        if step % self._interval or len(self._groups[0]) < 2:
            return {}
        seconds = self._gather(self._seconds / self._steps)
        self._steps, self._seconds = 0, 0.0
        ratios = {
            rank: seconds[rank] / middle
            for group in self._groups
            if (middle := statistics.median(seconds[rank] for rank in group)) > 0
            for rank in group
        }
        if not ratios:
            return {}
        self._tell_the_slow(ratios)
        slowest = max(ratios, key=lambda rank: ratios[rank])
        return {
            "slowest_rank": slowest,
            "slowest_rank_time": seconds[slowest],
            "slowest_rank_ratio": ratios[slowest],
        }

    def _tell_the_slow(self, ratios: dict[int, float]) -> None:
        self._slow_before = {
            rank: self._slow_before.get(rank, 0) + 1 for rank, ratio in ratios.items() if ratio >= SLOW
        }
        for rank, times in self._slow_before.items():
            if times == TIMES:
                log.warn(
                    f"rank {rank} has been slow for {TIMES * self._interval} steps: it computes {ratios[rank]:.2f} "
                    "times as long as the middle one of those that do the same work, and all wait for it"
                )
