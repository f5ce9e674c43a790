"""Parameters whose gradients are reduced together, in the order in which backward makes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch


def in_backward_order(parameters: Iterable[torch.nn.Parameter], elements: int) -> list[list[torch.nn.Parameter]]:
    """`parameters`, given in the order of the forward pass, from the last to the first in buckets of at least so many
    elements, but for the last bucket."""
    buckets: list[list[torch.nn.Parameter]] = []
    filled = elements
    for parameter in reversed(list(parameters)):
        if filled >= elements:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel()
    return buckets


class Sum(Protocol):
    """A sum over ranks that is on its way."""

    def wait(self) -> None:
        """Until it is there."""


class GradientBuckets:
    """Calls `start` with the number of each bucket, in order and so alike on all ranks, and waits for what it gives.

    After `expect` a bucket is started as soon as all its parameters have `arrived` and those before it are started;
    `finish` starts the others, without `expect` all of them. At most `under_way` are not waited for at a time.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[torch.nn.Parameter]],
        start: Callable[[int], Iterable[Sum]],
        *,
        under_way: int,
    ):
        self._start = start
        self._most = under_way
        self._lengths = [len(bucket) for bucket in buckets]
        self._bucket_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._next = 0
        self._under_way: deque[Iterable[Sum]] = deque()

    def expect(self) -> None:
        """The gradients that come from now on are the last of this step."""
        self._missing = list(self._lengths)

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """A parameter's gradient was made, and added to those of earlier micro-batches."""
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._next < len(self._missing) and not self._missing[self._next]:
            self._begin_next()

    def finish(self) -> None:
        """Start what has not been started, also where a parameter had no gradient, and wait for all."""
        while self._next < len(self._lengths):
            self._begin_next()
        self._wait_for_all_but(0)
        self._missing, self._next = [], 0

    def _begin_next(self) -> None:
        self._under_way.append(self._start(self._next))
        self._next += 1
        self._wait_for_all_but(self._most)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self._under_way) > count:
            for total in self._under_way.popleft():
                total.wait()
