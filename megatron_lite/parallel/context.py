"""The context axis: ranks that share each sequence, and how it is split and exchanged between them.

The sequence is cut into 2 c chunks for c ranks, and rank r has chunks r and 2 c - 1 - r ("zigzag"), so that under a
causal mask all ranks have as much to do. Attention alone needs other ranks' tokens: keys and values go round a ring
(`ring_attention`, "p2p"), or every rank gets whole sequences of some heads (Ulysses, Jacobs et al. 2023, "a2a").
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.collectives import Group, all_gather


@dataclasses.dataclass(frozen=True)
class ContextAxis:
    """The context axis as layers use it in one forward pass; by default of size 1, where a part is the whole."""

    group: Group = None
    exchange: Literal["p2p", "a2a"] = "p2p"

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def is_ring(self) -> bool:
        return self.group is not None and self.exchange == "p2p"

    def splits(self, length: int) -> bool:
        """Whether a sequence of that length can be shared out."""
        return self.size == 1 or length % (2 * self.size) == 0

    def part(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's chunks of a tensor along `dim`. Raises ValueError for a length that cannot be shared out."""
        if self.size == 1:
            return whole
        if not self.splits(whole.shape[dim]):
            raise ValueError(f"a sequence of {whole.shape[dim]} cannot be cut into 2 x {self.size} chunks")
        chunks = whole.chunk(2 * self.size, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def join(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor whose parts all ranks have. Not differentiable."""
        if self.size == 1:
            return part
        return _in_order(all_gather(part.movedim(dim, 0), self.group), self.size).movedim(0, dim)

    def spans(self, first: int, last: int, length: int) -> list[tuple[int, int]]:
        """(tokens, place in the whole sequence of the first of them) of each stretch of this rank's tokens
        [first, last) out of its `length`."""
        if self.size == 1:
            return [(last - first, first)]
        half = length // 2
        found = []
        for chunk, begin in ((self.rank, 0), (2 * self.size - 1 - self.rank, half)):
            start, stop = max(first, begin), min(last, begin + half)
            if start < stop:
                found.append((stop - start, chunk * half + start - begin))
        return found

    def to_heads(self, part_SBND: torch.Tensor) -> torch.Tensor:
        """The whole sequence in order, of this rank's share of the heads: [S, B, N, D] -> [S c, B, N / c, D].

        Fewer heads than ranks are repeated for the ranks that share one. Raises ValueError where heads cannot be shared
        out.
        """
        if self.is_ring or self.group is None:
            return part_SBND
        heads = part_SBND.shape[2]
        if self.size % heads == 0:
            part_SBND = part_SBND.repeat_interleave(self.size // heads, 2)
        elif heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared out over {self.size} context ranks")
        return _ToHeads.apply(part_SBND, self.group)

    def to_sequence(self, whole_SBND: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sequence, of all heads: the inverse of `to_heads`."""
        if self.is_ring or self.group is None:
            return whole_SBND
        return _ToSequence.apply(whole_SBND, self.group)


def _in_order(parts: torch.Tensor, size: int) -> torch.Tensor:
    """The whole sequence out of all ranks' parts, one behind the other along dim 0."""
    chunks = parts.unflatten(0, (size, 2, -1))
    return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)


def _by_rank(whole: torch.Tensor, size: int) -> torch.Tensor:
    """All ranks' parts, [rank, ...], out of the whole sequence along dim 0."""
    chunks = whole.unflatten(0, (2 * size, -1))
    return torch.stack((chunks[:size], chunks[size:].flip(0)), 1).flatten(1, 2)


def _all_to_all(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Entry i of `parts` goes to rank i; what comes from rank i becomes entry i."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def _gather_tokens(part_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    size = group.size()
    by_rank = part_SBND.unflatten(2, (size, -1)).movedim(2, 0)
    return _in_order(_all_to_all(by_rank, group).flatten(0, 1), size)


def _gather_heads(whole_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    by_rank = _by_rank(whole_SBND, group.size())
    return _all_to_all(by_rank, group).movedim(0, 2).flatten(2, 3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        return _gather_tokens(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _gather_heads(gradient, ctx.group), None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, group):
        ctx.group = group
        return _gather_heads(whole, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _gather_tokens(gradient, ctx.group), None
