"""Parameters whose gradients are reduced together, in the order in which backward makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


class GradientBuckets:
    """Calls `start` with the number of each bucket, in order and so alike on all ranks.

    After `expect` a bucket is started as soon as all its parameters have `arrived` and those before it are started;
    `finish` starts the others. Without `expect` that is all of them.
    """

    def __init__(self, buckets: Sequence[Sequence[torch.nn.Parameter]], start: Callable[[int], None]):
        self._start = start
        self._lengths = [len(bucket) for bucket in buckets]
        self._bucket_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._next = 0

    def expect(self) -> None:
        """The gradients that come from now on are the last of this step."""
        self._missing = list(self._lengths)

    def arrived(self, parameter: torch.nn.Parameter) -> None:
        """A parameter's gradient was made, and added to those of earlier micro-batches."""
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._next < len(self._missing) and not self._missing[self._next]:
            self._next += 1
            self._start(self._next - 1)

    def finish(self) -> None:
        """Start what has not been started, also where a parameter had no gradient."""
        for number in range(self._next, len(self._lengths)):
            self._start(number)
        self._missing, self._next = [], 0
