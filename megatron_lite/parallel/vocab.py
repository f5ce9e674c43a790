"""What is split over the vocabulary: embedding, cross-entropy, argmax, and gathering logits.

The vocabulary is padded in memory alone. Padded rows of the weights are zero and take no gradient;
padded logits are no part of any loss, argmax or gathered row.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_lite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megatron_lite.parallel.collectives import Group, all_gather
from megatron_lite.parallel.layout import split
from megatron_lite.parallel.linear import TensorAxis, empty_parameter
from megatron_lite.parallel.process_mesh import ProcessMesh


@dataclasses.dataclass(frozen=True)
class VocabularyPart:
    """The token ids of one tensor rank: [first, first + held), in `length` rows of which the last are padding."""

    vocab_size: int
    padded_size: int
    first: int
    length: int

    @staticmethod
    def of(vocab_size: int, divisible_by: int, mesh: ProcessMesh) -> VocabularyPart:
        """The part of this rank, of a vocabulary padded to a multiple of `divisible_by` x tensor size."""
        multiple = divisible_by * mesh.size("tensor")
        padded_size = math.ceil(vocab_size / multiple) * multiple
        length = padded_size // mesh.size("tensor")
        return VocabularyPart(vocab_size, padded_size, mesh.rank("tensor") * length, length)

    @property
    def held(self) -> int:
        """Ids of the true vocabulary here; may be 0."""
        return max(0, min(self.length, self.vocab_size - self.first))

    def tiles(self, columns: int) -> list[VocabularyPart]:
        """This part, padding included, as parts of up to so many ids."""
        return [
            dataclasses.replace(self, first=self.first + begin, length=min(columns, self.length - begin))
            for begin in range(0, self.length, columns)
        ]

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, here): the local row of each id, and whether it is here; row 0 where it is not."""
        rows = ids - self.first
        here = (rows >= 0) & (rows < self.held)
        return rows.masked_fill(~here, 0), here


class VocabParallelEmbedding(nn.Module):
    """Token vectors split by rows over tensor ranks: [S, B] ids -> [S, B, H], as `TensorAxis.leave` leaves them.

    `weight` is [V, H] globally.
    """

    def __init__(
        self,
        part: VocabularyPart,
        hidden_size: int,
        mesh: ProcessMesh,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._part = part
        self.weight = vocabulary_weight(part, hidden_size, mesh, device=device, dtype=dtype)

    def forward(self, tokens_SB: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        if axis.size == 1:
            return F.embedding(tokens_SB, self.weight)
        rows, here = self._part.find(tokens_SB)
        return axis.leave(F.embedding(rows, self.weight) * here.unsqueeze(-1))


def vocabulary_weight(
    part: VocabularyPart,
    hidden_size: int,
    mesh: ProcessMesh,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """An empty [V, H] parameter split by rows of the padded vocabulary: of an embedding or an output head."""
    shape = (part.vocab_size, hidden_size)
    layout = split(shape, 0, mesh.rank("tensor"), mesh.size("tensor"), padded=part.padded_size)
    return empty_parameter(layout, device=device, dtype=dtype)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    part: VocabularyPart,
    group: Group,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The loss of each token in fp32: `logits` [..., V of this rank], `labels` [...] -> [...], equal on all ranks.

    With log-partition Z, target x_t and mean logit m over the true vocabulary, the loss is
    Z - (1 - label_smoothing) x_t - label_smoothing m + z_loss Z^2 (Szegedy et al. 2016; Chowdhery et
    al. 2022). A negative label is no target: loss and gradient are 0. One of `vocab_size` or more gives NaN.

    One all-gather of four numbers a token joins the ranks. Backward runs once and uses `logits` up: their gradient is
    written over them, in their dtype. Raises ValueError for a leaf of the graph, which somebody else still holds.
    """
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are a leaf that requires grad, which backward would overwrite with "
            "their gradient; pass logits.clone()"
        )
    return _CrossEntropy.apply(logits, labels, part, group, label_smoothing, z_loss)


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    part: VocabularyPart,
    group: Group,
    *,
    columns: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`vocab_parallel_cross_entropy` of the logits `hidden` weight^T, of which only `columns` are ever there at once.

    hidden: [..., H], as it entered the split region; weight: [V of this rank, H] of the same dtype.

    A tile of the vocabulary is to a rank what a rank is to the whole, so tiles join as ranks do, and one all-gather
    still serves. Backward makes a tile's logits again, a fourth matrix product beside three: that keeps neither
    logits nor, from forward to backward, a gradient as large as the weight; the weight's gradient is summed over
    all tokens within one product. As in Cut Cross-Entropy (Wijmans et al. 2025).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, part, group, columns, label_smoothing, z_loss)


def _join(statistics: torch.Tensor) -> torch.Tensor:
    """`cross_entropy_statistics` of parts of a vocabulary, [parts, 4, T], as those of their sum, [4, T]."""
    peaks, partitions, targets, sums = statistics.unbind(1)
    top = peaks.amax(0)
    return torch.stack((top, (partitions * (peaks - top).exp()).sum(0), targets.sum(0), sums.sum(0)))


def _losses(
    statistics: torch.Tensor,
    labels: torch.Tensor,
    part: VocabularyPart,
    group: Group,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, top, factor) from this rank's statistics [4, T]; the last two are `cross_entropy_gradient_`'s."""
    top, partition, target, logit_sum = _join(all_gather(statistics.unsqueeze(0), group)).unbind()
    # The difference of two logits first: it is small, their sizes need not be.
    loss = partition.log() + (top - target)
    factor = partition.reciprocal()
    if label_smoothing:
        loss += label_smoothing * (target - logit_sum / part.vocab_size)
    if z_loss:
        log_partition = partition.log() + top
        loss += z_loss * log_partition.square()
        factor *= 1.0 + 2.0 * z_loss * log_partition
    return loss.masked_fill_(labels < 0, 0.0).masked_fill_(labels >= part.vocab_size, math.nan), top, factor


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, part, group, label_smoothing, z_loss):
        rows, ids = logits.reshape(-1, part.length).contiguous(), labels.reshape(-1)
        statistics = cross_entropy_statistics(rows, ids, first=part.first, held=part.held)
        loss, top, factor = _losses(statistics, ids, part, group, label_smoothing, z_loss)
        ctx.save_for_backward(rows, ids, top, factor)
        ctx.part, ctx.label_smoothing, ctx.shape, ctx.done = part, label_smoothing, logits.shape, False
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient):
        if ctx.done:
            raise RuntimeError("the cross-entropy's backward overwrites the logits, and can run only once")
        ctx.done = True
        gradient = _gradient_(*ctx.saved_tensors, loss_gradient.reshape(-1), ctx.part, ctx.label_smoothing)
        return gradient.view(ctx.shape), None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, part, group, columns, label_smoothing, z_loss):
        hidden_TH, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        statistics = [
            cross_entropy_statistics(hidden_TH @ rows.t(), ids, first=tile.first, held=tile.held)
            for tile, rows in zip(part.tiles(columns), weight.split(columns), strict=True)
        ]
        loss, top, factor = _losses(_join(torch.stack(statistics)), ids, part, group, label_smoothing, z_loss)
        ctx.save_for_backward(hidden_TH, weight, ids, top, factor)
        ctx.part, ctx.columns, ctx.label_smoothing, ctx.shape = part, columns, label_smoothing, hidden.shape
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient):
        hidden_TH, weight, *of_tokens = ctx.saved_tensors
        # A tile's share is a sum over its columns alone: shares are added in fp32.
        hidden_gradient = torch.zeros_like(hidden_TH, dtype=torch.float32)
        weight_gradient = torch.empty_like(weight)
        for tile, rows, rows_gradient in zip(
            ctx.part.tiles(ctx.columns), weight.split(ctx.columns), weight_gradient.split(ctx.columns), strict=True
        ):
            logits = hidden_TH @ rows.t()
            gradient = _gradient_(logits, *of_tokens, loss_gradient.reshape(-1), tile, ctx.label_smoothing)
            torch.mm(gradient.t(), hidden_TH, out=rows_gradient)
            hidden_gradient += gradient @ rows
            # Before the next tile's logits are there.
            del logits, gradient
        hidden_gradient = hidden_gradient.to(hidden_TH.dtype).view(ctx.shape)
        return hidden_gradient, weight_gradient, None, None, None, None, None, None


def _gradient_(logits, labels, top, factor, loss_gradient, part, label_smoothing):
    return cross_entropy_gradient_(
        logits,
        labels,
        top,
        factor,
        loss_gradient,
        first=part.first,
        held=part.held,
        label_smoothing=label_smoothing,
        vocab_size=part.vocab_size,
    )


def vocab_parallel_argmax(logits: torch.Tensor, part: VocabularyPart, group: Group) -> torch.Tensor:
    """The id of the largest logit, the first of equal ones: [..., V of this rank] -> [...], equal on all ranks."""
    held = logits[..., : part.held].float()
    if part.held:
        values, rows = held.max(-1)
    else:
        values = held.new_full(held.shape[:-1], -math.inf)
        rows = torch.zeros_like(values, dtype=torch.int64)
    # fp64 holds an fp32 value and an id exactly, so one message carries both.
    best = all_gather(torch.stack((values.double(), (rows + part.first).double())).unsqueeze(0), group)
    winner = best[:, 0].argmax(0, keepdim=True)
    return best[:, 1].gather(0, winner).squeeze(0).long()


def gather_vocabulary(logits: torch.Tensor, part: VocabularyPart, group: Group) -> torch.Tensor:
    """All logits of the true vocabulary: [..., V of this rank] -> [..., V], equal on all ranks. Not differentiable."""
    return all_gather(logits, group, logits.dim() - 1)[..., : part.vocab_size]
