"""How gradients are asked for: one micro-batch at a time, or by a pipeline's schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

Backward = Callable[[torch.Tensor], None]


@dataclasses.dataclass(frozen=True)
class SharedWeight:
    """A weight that this rank and one of another pipeline stage both have, whose gradient is the sum of both."""

    parameter: torch.nn.Parameter
    group: dist.ProcessGroup

    def join(self, gradient: torch.Tensor) -> None:
        """Make `gradient` that sum, in place; both ranks call."""
        dist.all_reduce(gradient, group=self.group)


@dataclasses.dataclass(frozen=True)
class ScheduledBackward:
    """What a pipeline's schedule is given, which calls backward by itself."""

    scaled: Callable[[torch.Tensor], torch.Tensor]
    """From a micro-batch's share of the loss to what backward begins from."""
    take_gradients: Callable[[Iterable[torch.nn.Parameter]], None] | None = None
    """To be told of parameters whose `.grad` was written without a hook being called."""
