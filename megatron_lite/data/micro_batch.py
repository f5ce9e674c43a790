"""What one forward pass of one data rank is fed, and how samples become that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_lite.data.length_curriculum import LengthCurriculum
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
    begins: torch.Tensor | None = None
    """bool [B, S], the tokens that nothing before them is seen from; None: the first of each sequence alone."""
    positions: torch.Tensor | None = None
    """int64 [B, S], the position of each token; None: its place in the sequence."""

    def pinned(self) -> MicroBatch:
        """The same, what goes to a GPU in memory that it copies from while the CPU goes on."""
        names = ("tokens", "labels", "loss_mask", *(() if self.positions is None else ("positions",)))
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclasses.dataclass(frozen=True)
class Assembly:
    """How samples become micro-batches: what the boundaries in them mean."""

    reset_attention_mask: bool = False
    """Attention does not look back behind a document's beginning."""
    reset_position_ids: bool = False
    """Positions count from a document's beginning."""
    eod: int | None = None
    """The token of which the successor is no target, if there is one."""
    curriculum: LengthCurriculum | None = None
    """Samples are divided further, into sequences that it says the length of."""

    def __call__(
        self, samples: Sequence[Sample], *, first_sample: int, index: int, consumed_samples: int
    ) -> MicroBatch:
        """The micro-batch of samples of one length, of the step that begins after `consumed_samples`."""
        tokens, labels = (
            torch.from_numpy(np.stack([sample.tokens[cut] for sample in samples], dtype=np.int64))
            for cut in (slice(None, -1), slice(1, None))
        )
        counted = torch.ones(labels.shape, dtype=torch.bool)
        for row, sample in zip(counted, samples, strict=True):
            if sample.counts is not None:
                row.copy_(torch.from_numpy(sample.counts[1:]))
        if self.eod is not None:
            counted &= tokens != self.eod
        piece = None if self.curriculum is None else self.curriculum.length(consumed_samples)
        begins = _begins(samples, tokens.shape[1], piece, self.reset_attention_mask)
        restarts = begins
        if self.reset_position_ids != self.reset_attention_mask:
            restarts = _begins(samples, tokens.shape[1], piece, self.reset_position_ids)
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            loss_mask=counted,
            first_sample=first_sample,
            index=index,
            begins=None if begins is None else torch.from_numpy(begins),
            positions=None if restarts is None else torch.from_numpy(places_since(restarts)),
        )


def _begins(samples: Sequence[Sample], length: int, piece: int | None, documents: bool) -> np.ndarray | None:
    """bool [B, S]: where pieces of sequences begin and, if asked for, documents; None if sequences are whole."""
    divides = piece is not None and piece < length
    if not divides and not documents:
        return None
    found = np.zeros((len(samples), length), np.bool_)
    found[:, :: piece if divides else length] = True
    if documents:
        for row, sample in zip(found, samples, strict=True):
            row[sample.starts[: np.searchsorted(sample.starts, length)]] = True
    return found


def places_since(begins: np.ndarray) -> np.ndarray:
    """int64 [..., S]: how many tokens ago the last one was that `begins`."""
    places = np.arange(begins.shape[-1])
    return places - np.maximum.accumulate(begins * places, axis=-1)
