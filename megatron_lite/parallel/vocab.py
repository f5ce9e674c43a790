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
    al. 2022). A negative label is no target: loss and gradient are 0.

    One all-gather of a few numbers a token joins the ranks. fp32 `logits` are used up: the softmax,
    and in backward the gradient, are written over them. Backward runs once.
    """
    return _CrossEntropy.apply(logits, labels, part, group, label_smoothing, z_loss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, part, group, label_smoothing, z_loss):
        exponentials = logits.detach().reshape(-1, part.length)
        if logits.dtype != torch.float32:
            exponentials = exponentials.float()
        exponentials[:, part.held :] = -math.inf
        rows, here = part.find(labels.reshape(-1))
        is_target = (labels >= 0).reshape(-1)

        target = exponentials.gather(1, rows.unsqueeze(1)).squeeze(1).masked_fill_(~here, 0.0)
        # A rank that holds padding alone has no maximum; any finite number will do.
        peak = exponentials.amax(1).clamp_(min=torch.finfo(torch.float32).min)
        logit_sum = exponentials[:, : part.held].sum(1) if label_smoothing else torch.zeros_like(peak)
        partition = exponentials.sub_(peak.unsqueeze(1)).exp_().sum(1)

        peaks, partitions, targets, logit_sums = all_gather(
            torch.stack((peak, partition, target, logit_sum)).unsqueeze(0), group
        ).unbind(1)
        top = peaks.amax(0)
        total = (partitions * (peaks - top).exp_()).sum(0)
        log_total = total.log()
        log_partition = log_total + top
        # The difference of two logits first: it is small, their sizes need not be.
        loss = log_total + (top - targets.sum(0))
        if label_smoothing:
            loss += label_smoothing * (targets.sum(0) - logit_sums.sum(0) / part.vocab_size)
        if z_loss:
            loss += z_loss * log_partition.square()

        ctx.exponentials, ctx.rows, ctx.here, ctx.is_target = exponentials, rows, here, is_target
        ctx.scale = (peak - top).exp_().div_(total)
        if z_loss:
            ctx.scale *= 1.0 + 2.0 * z_loss * log_partition
        ctx.part, ctx.label_smoothing, ctx.dtype, ctx.shape = part, label_smoothing, logits.dtype, logits.shape
        return loss.masked_fill_(~is_target, 0.0).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient):
        if ctx.exponentials is None:
            raise RuntimeError("the cross-entropy's backward overwrites what it saved, and can run only once")
        gradient, ctx.exponentials = ctx.exponentials, None
        per_token = loss_gradient.reshape(-1).float() * ctx.is_target
        gradient.mul_((ctx.scale * per_token).unsqueeze(1))
        at_target = per_token * ctx.here * (ctx.label_smoothing - 1.0)
        gradient.scatter_add_(1, ctx.rows.unsqueeze(1), at_target.unsqueeze(1))
        if ctx.label_smoothing:
            gradient[:, : ctx.part.held] -= (ctx.label_smoothing / ctx.part.vocab_size * per_token).unsqueeze(1)
        return gradient.to(ctx.dtype).view(ctx.shape), None, None, None, None, None


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
