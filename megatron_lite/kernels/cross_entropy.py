"""Cross-entropy over a part of a vocabulary: statistics that parts join, and the gradient in place of the logits.

The formula is in csrc/cross_entropy/cross_entropy.h; what joins the parts, in parallel/vocab.py.
"""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import check_like
from megatron_lite.kernels.operators import define

_LOWEST = torch.finfo(torch.float32).min


def cross_entropy_statistics(logits: torch.Tensor, labels: torch.Tensor, *, first: int, held: int) -> torch.Tensor:
    """What each row tells of the loss, in one pass over memory: fp32 [4, R].

    logits: [R, L], fp32, bf16 or fp16, any strides, of which columns [0, held) are ids [first, first + held) of the
    vocabulary; those after are padding and change nothing. labels: int64 [R]. Gives the largest logit, the sum of
    exp(logit - largest), the label's logit (0 where the label is not here) and the sum of the logits, all fp32
    inside. A part without columns gives the lowest fp32 number and three zeros, and so does a row of -inf, but for its
    sum. A NaN makes its row's second and fourth number NaN, +inf the second. An exponential below exp(-87) is 0. Not
    differentiable: see `cross_entropy_gradient_`. Raises TypeError for a dtype and ValueError for a shape, a device
    or a number that will not do. One pass by rescaling: Milakov and Gimelshein 2018.
    """
    _check("cross_entropy_statistics", logits, labels, first, held)
    return _statistics(logits, labels, first, held)


@torch.no_grad()
def cross_entropy_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    top: torch.Tensor,
    factor: torch.Tensor,
    gradient: torch.Tensor,
    *,
    first: int,
    held: int,
    label_smoothing: float,
    vocab_size: int,
) -> torch.Tensor:
    """The gradient of each row's loss, written over its logits, which are returned.

    gradient (factor exp(logits - top) - label_smoothing / vocab_size - (1 - label_smoothing) [at the label])

    logits, labels, first, held: as `cross_entropy_statistics`; logits contiguous. top: the largest logit of the whole
    vocabulary, or anything above it. factor: what exp(logits - top) is multiplied by, 1 / its sum for cross-entropy
    alone. gradient: of the losses. These three are fp32 [R]. Rounded once. A row with a negative label or a
    gradient of 0 becomes 0 whatever is in it, and so does padding; a NaN elsewhere stays one. Raises as
    `cross_entropy_statistics`.
    """
    operation = "cross_entropy_gradient_"
    _check(operation, logits, labels, first, held)
    if not logits.is_contiguous():
        raise ValueError(
            f"{operation}: logits of shape {tuple(logits.shape)} have strides {logits.stride()}; what is overwritten "
            "must be contiguous"
        )
    for name, values in (("top", top), ("factor", factor), ("gradient", gradient)):
        if values.dtype != torch.float32:
            raise TypeError(f"{operation}: {name} is {values.dtype}; float32 is needed")
        _check_rows(operation, logits, name, values)
    if not 0 <= label_smoothing <= 1 or vocab_size < 1:
        raise ValueError(
            f"{operation}: label_smoothing={label_smoothing}, vocab_size={vocab_size}; a share from 0 to 1 and a "
            "vocabulary are needed"
        )
    _gradient(logits, labels, top, factor, gradient, first, held, label_smoothing, vocab_size)
    torch.autograd.graph.increment_version(logits)
    return logits


def _check(operation: str, logits: torch.Tensor, labels: torch.Tensor, first: int, held: int) -> None:
    check_like(operation, logits)
    if logits.dim() != 2:
        raise ValueError(f"{operation}: logits have shape {tuple(logits.shape)}; [rows, vocabulary] is needed")
    if labels.dtype != torch.int64:
        raise TypeError(f"{operation}: labels are {labels.dtype}; int64 is needed")
    _check_rows(operation, logits, "labels", labels)
    if first < 0 or not 0 <= held <= logits.shape[1]:
        raise ValueError(
            f"{operation}: first={first}, held={held} and {logits.shape[1]} columns; first is at least 0 and held "
            f"between 0 and {logits.shape[1]}"
        )


def _check_rows(operation: str, logits: torch.Tensor, name: str, values: torch.Tensor) -> None:
    if tuple(values.shape) != (logits.shape[0],):
        raise ValueError(
            f"{operation}: {name} of shape {tuple(values.shape)} for logits {tuple(logits.shape)}; "
            f"({logits.shape[0]},) is needed"
        )
    if values.device != logits.device:
        raise ValueError(f"{operation}: {name} on {values.device} and logits on {logits.device}; move one")


def _columns(labels: torch.Tensor, first: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    columns = labels - first
    here = (columns >= 0) & (columns < held)
    return columns.masked_fill(~here, 0).unsqueeze(1), here


def _statistics_reference(logits, labels, first, held):
    statistics = logits.new_zeros((4, logits.shape[0]), dtype=torch.float32)
    peak, partition, target, total = statistics.unbind()
    peak.fill_(_LOWEST)
    if held:
        x = logits[:, :held].float()
        columns, here = _columns(labels, first, held)
        # A NaN is no peak: it shows in the sums.
        peak.copy_(x.masked_fill(x.isnan(), _LOWEST).amax(1).clamp_(min=_LOWEST))
        partition.copy_((x - peak.unsqueeze(1)).exp_().sum(1))
        target.copy_(x.gather(1, columns).squeeze(1).masked_fill_(~here, 0))
        total.copy_(x.sum(1))
    return statistics


def _statistics_fake(logits, labels, first, held):
    return logits.new_empty((4, logits.shape[0]), dtype=torch.float32)


def _gradient_reference(logits, labels, top, factor, gradient, first, held, label_smoothing, vocab_size):
    if held:
        columns, here = _columns(labels, first, held)
        dx = (logits[:, :held].float() - top.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
        dx -= label_smoothing / vocab_size
        dx.scatter_add_(1, columns, here.float().mul_(label_smoothing - 1).unsqueeze(1))
        nothing = (labels < 0) | (gradient == 0)
        logits[:, :held] = dx.mul_(gradient.unsqueeze(1)).masked_fill_(nothing.unsqueeze(1), 0)
    logits[:, held:] = 0


def _gradient_fake(*arguments):
    return None


_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor labels, int first, int held) -> Tensor",
    reference=_statistics_reference,
    fake=_statistics_fake,
)
_gradient = define(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor top, Tensor factor, Tensor gradient, int first, "
    "int held, float label_smoothing, int vocab_size) -> ()",
    reference=_gradient_reference,
    fake=_gradient_fake,
)
