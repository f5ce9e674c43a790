"""Several token sets drawn from in fixed proportions, as arithmetic on the number of the draw."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_lite.errors import ConfigError

LARGEST_PERIOD = 1 << 18
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def parse_data_path(entries: Sequence[str]) -> tuple[list[str], list[Fraction] | None]:
    """Prefixes and weights of `PREFIX`, `PREFIX PREFIX ...` (no weights) or `WEIGHT PREFIX WEIGHT PREFIX ...`.

    Raises ConfigError for another mixture of numbers and prefixes, and for weights not above 0.
    """
    is_number = [_NUMBER.fullmatch(entry) is not None for entry in entries]
    if not any(is_number):
        return list(entries), None
    if is_number != [True, False] * (len(entries) // 2):
        raise ConfigError(
            f'data path "{" ".join(entries)}" mixes weights and prefixes; write prefixes alone, or a weight before '
            "every prefix: 0.7 data/web 0.3 data/code."
        )
    prefixes, weights = list(entries[1::2]), [Fraction(entry) for entry in entries[::2]]
    for prefix, weight, text in zip(prefixes, weights, entries[::2], strict=True):
        if weight <= 0:
            raise ConfigError(f"data path gives {prefix} the weight {text}; weights are above 0, leave the prefix out.")
    return prefixes, weights


def whole_shares(weights: Sequence[Fraction], largest_period: int = LARGEST_PERIOD) -> list[int]:
    """How often each set is drawn in one period: exact, if a period of `largest_period` draws allows it.

    Otherwise rounded to it by largest remainder, at least 1 each.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= largest_period:
        return counts
    exact = [Fraction(count * largest_period, total) for count in counts]
    rounded = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: rounded[i] - exact[i])
    for i in by_remainder[: max(0, largest_period - sum(rounded))]:
        rounded[i] += 1
    return rounded


def _draws_of_a_period(counts: Sequence[int]) -> np.ndarray:
    """The set of each draw, such that after every draw each set's count is within 1 of its share.

    With weight w, draw j of a set (from 1) may not come before floor((j - 1) / w) and is due by
    ceil(j / w); taking the earliest due first meets every date because the weights add up to 1
    (Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation").
    """
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
    draws is tabulated (12 bytes a draw at most 2^18); any k costs the same. `counts` of `period` draws
    are each set's.
    """

    def __init__(self, weights: Sequence[Fraction]):
        self.counts = whole_shares(weights)
        self.period = sum(self.counts)
        self._member = _draws_of_a_period(self.counts)
        self._number = np.empty(self.period, np.int64)
        for member, count in enumerate(self.counts):
            self._number[self._member == member] = np.arange(count)

    def __call__(self, draw: int) -> tuple[int, int]:
        """Set and its sample number of draw `draw`, from 0."""
        periods, at = divmod(draw, self.period)
        member = int(self._member[at])
        return member, periods * self.counts[member] + int(self._number[at])
