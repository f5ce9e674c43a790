"""The context axis: ranks that share each sequence, and how it is split and exchanged between them.

The sequence is cut into 2 c chunks for c ranks, and rank r has chunks r and 2 c - 1 - r ("zigzag"), so that under a
causal mask all ranks have as much to do. Attention alone needs other ranks' tokens: keys and values go round a ring
(`ring_attention`, "p2p"), or every rank gets whole sequences of some heads (Ulysses, Jacobs et al. 2023, "a2a").
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from megatron_lite.parallel.collectives import Group, all_gather, heads_to_sequence, sequence_to_heads


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
        return _in_order(sequence_to_heads(part_SBND, self.group), self.size)

    def to_sequence(self, whole_SBND: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sequence, of all heads: the inverse of `to_heads`."""
        if self.is_ring or self.group is None:
            return whole_SBND
        return heads_to_sequence(_by_rank(whole_SBND, self.size), self.group)


def _in_order(parts: torch.Tensor, size: int) -> torch.Tensor:
    """The whole sequence out of all ranks' parts, one behind the other along dim 0."""
    first, second = parts.unflatten(0, (size, 2, -1)).unbind(1)
    return torch.cat((first, second.flip(0))).flatten(0, 1)


def _by_rank(whole: torch.Tensor, size: int) -> torch.Tensor:
    """All ranks' parts, one behind the other, out of the whole sequence along dim 0."""
    first, second = whole.unflatten(0, (2 * size, -1)).chunk(2)
    return torch.stack((first, second.flip(0)), 1).flatten(0, 2)
