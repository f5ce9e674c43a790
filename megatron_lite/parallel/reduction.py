"""A sum over ranks that is on its way while its ranks compute."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_lite.parallel.whereabouts import HERE

_TAG = 1
"""Tells these messages from others between the same ranks, which have 0."""


class SumAtOwner:
    """The sum of the ranks' contiguous `tensor`s, on its way to that of rank `owner` of the group.

    All ranks begin their sums in the same order. Nobody touches a tensor before `wait`, and what ranks other than the
    owner then hold is used up. The order of addition is that of `reduce_scatter_in_place`.
    """

    def __init__(self, tensor: torch.Tensor, owner: int, group: dist.ProcessGroup):
        rank, size = group.rank(), group.size()
        self._tensor = tensor
        self._arriving: list[tuple[int, torch.Tensor, dist.Work]] = []
        self._work: dist.Work | None = None
        if tensor.device.type != "cpu":
            self._work = dist.reduce(tensor, group=group, group_dst=owner, async_op=True)
        elif rank != owner:
            self._work = dist.isend(tensor, group=group, group_dst=owner, tag=_TAG)
        else:
            # gloo's own sum would keep one of its threads at it, and add in another order.
            for distance in range(1, size):
                source, part = (rank - distance) % size, torch.empty_like(tensor)
                work = dist.irecv(part, group=group, group_src=source, tag=_TAG)
                self._arriving.append((dist.get_global_rank(group, source), part, work))

    def wait(self) -> None:
        """Until the owner has the sum, and others may use their tensor; on a GPU its stream waits, not the host."""
        if self._work is not None:
            with HERE.waiting():
                self._work.wait()
        for source, part, work in self._arriving:
            with HERE.waiting("gradients to sum", source):
                work.wait()
            self._tensor.add_(part)
