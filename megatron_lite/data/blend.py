"""Several token sets drawn from in fixed proportions, as arithmetic on the number of the draw."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_lite.kernels import host

LARGEST_PERIOD = 1 << 18


def whole_shares(weights: Sequence[Fraction | int], largest_period: int = LARGEST_PERIOD) -> list[int]:
    """How often each set is drawn in one period: exact, if a period of `largest_period` draws allows it.

    Otherwise rounded to it by largest remainder, at least 1 each but for a weight of 0.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = [scale // weight.denominator * weight.numerator for weight in weights]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= largest_period:
        return counts
    rounded = [max(1, count * largest_period // total) if count else 0 for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: rounded[i] * total - counts[i] * largest_period)
    for i in by_remainder[: max(0, largest_period - sum(rounded))]:
        rounded[i] += 1
    return rounded


def _draws_of_a_period(counts: Sequence[int]) -> np.ndarray:
    """The set of each draw, such that after every draw each set's count is within 1 of its share.

    With weight w, draw j of a set (from 1) may not come before floor((j - 1) / w) and is due by
    ceil(j / w); taking the earliest due first meets every date because the weights add up to 1
    (Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation").
    csrc/host/draws.h computes the same and is used where it is compiled.
    """
    if (compiled := host.module()) is not None:
        return compiled.draws_of_a_period(counts)
    period = sum(counts)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for member, count in enumerate(counts):
        for j in range(count):
            released[j * period // count].append((-(-(j + 1) * period // count), member))
    waiting: list[tuple[int, int]] = []
    draws = np.empty(period, np.int32)
    for at, jobs in enumerate(released):
        for job in jobs:
            heapq.heappush(waiting, job)
        draws[at] = heapq.heappop(waiting)[1]
    return draws


class Blend:
    """Which set draw k takes from, and which sample of that set it is.

    After any number k of draws a set with weight w has given k * w samples, to within 1. One period of
    draws is tabulated (12 bytes a draw); any k costs the same. `counts` of `period` draws are each set's.
    """

    def __init__(self, weights: Sequence[Fraction | int], largest_period: int = LARGEST_PERIOD):
        self.counts = whole_shares(weights, largest_period)
        self.period = sum(self.counts)
        self._member = _draws_of_a_period(self.counts)
        self._by_member = np.argsort(self._member, kind="stable").astype(np.int32)
        self._firsts = [0, *itertools.accumulate(self.counts)]
        self._number = np.empty(self.period, np.int32)
        self._number[self._by_member] = np.arange(self.period) - np.repeat(self._firsts[:-1], self.counts)

    def __call__(self, draw: int) -> tuple[int, int]:
        """Set and its sample number of draw `draw`, from 0."""
        periods, at = divmod(draw, self.period)
        member = int(self._member[at])
        return member, periods * self.counts[member] + int(self._number[at])

    def drawn(self, draws: int) -> list[int]:
        """How many samples each set gives in the first `draws` draws."""
        periods, at = divmod(draws, self.period)
        begun = np.bincount(self._member[:at], minlength=len(self.counts)).tolist()
        return [periods * count + more for count, more in zip(self.counts, begun, strict=True)]

    def draw_of(self, member: int, number: int) -> int:
        """The draw that takes sample `number` of a set with a weight."""
        periods, at = divmod(number, self.counts[member])
        return periods * self.period + int(self._by_member[self._firsts[member] + at])
