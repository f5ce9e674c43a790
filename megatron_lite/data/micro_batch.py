"""What one forward pass of one data rank is fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_lite.data.sample import Sample


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass on one data rank."""

    tokens: torch.Tensor
    """int64 [B, S], what the model sees."""
    labels: torch.Tensor
    """int64 [B, S], the token that follows each."""
    loss_mask: torch.Tensor
    """bool [B, S], which labels count as targets."""
    first_sample: int
    """Number of the first of the B samples, counted as consumed."""
    index: int
    """Number of the micro-batch within the global batch, over all data ranks."""


def assemble(samples: Sequence[Sample], *, first_sample: int, index: int) -> MicroBatch:
    """The micro-batch of samples of one length."""
    block = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64, copy=False))
    counted = torch.ones(block.shape, dtype=torch.bool)
    for row, sample in zip(counted, samples, strict=True):
        if sample.counts is not None:
            row.copy_(torch.from_numpy(sample.counts))
    return MicroBatch(
        tokens=block[:, :-1].contiguous(),
        labels=block[:, 1:].contiguous(),
        loss_mask=counted[:, 1:].contiguous(),
        first_sample=first_sample,
        index=index,
    )
