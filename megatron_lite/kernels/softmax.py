"""Softmax of scaled logits: of all, of what a mask shows, or of the past. The formula is in csrc/softmax/softmax.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import check_like
from megatron_lite.kernels.operators import define


def softmax(input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """softmax(scale * input) over the last dim.

    input: [..., L], fp32, bf16 or fp16, any strides and lengths. Gives a contiguous [..., L]. fp32 inside, the scale
    too, rounded once. Differentiable once, from the output alone. A row of -inf alone is 0 (torch: NaN); a NaN or
    +inf makes its row NaN; a probability below exp(-87) of the row's largest is 0. Raises TypeError for a dtype and
    ValueError for a shape or device that will not do.
    """
    _check("softmax", input, 1)
    return _softmax(input, None, scale, False)


def causal_softmax(input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """softmax(scale * input) over the columns a query may see, 0 in those after them.

    As `softmax`; input: [..., Q, L], of which query q sees columns 0 to q + L - Q: the last query sees all, be they
    its own sequence's (Q = L) or also those of a cache before it (Q < L). With Q > L the first queries see nothing,
    and are 0. Hidden columns are not read: a NaN in one changes nothing. Megatron's upper-triangular masked softmax
    (Shoeybi et al. 2019).
    """
    _check("causal_softmax", input, 2)
    return _softmax(input, None, scale, True)


def masked_softmax(input: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """softmax(scale * input) over the last dim's elements where `mask` is false, 0 where it is true.

    As `softmax`; mask: booleans that broadcast to input's shape, true where a query may not see (Megatron's sense,
    the opposite of torch's attention). It is read through its strides, not expanded. A row that is hidden
    altogether is 0. What is hidden changes nothing, be it NaN; a NaN or +inf that is seen makes all of its row NaN,
    what is hidden too.
    """
    _check("masked_softmax", input, 1)
    if mask.dtype != torch.bool:
        raise TypeError(f"masked_softmax: mask is {mask.dtype}; booleans are needed, true where a column is hidden")
    if mask.device != input.device:
        raise ValueError(f"masked_softmax: mask is on {mask.device} and input is on {input.device}; move one")
    try:
        mask = mask.expand(input.shape)
    except RuntimeError:
        raise ValueError(
            f"masked_softmax: mask of shape {tuple(mask.shape)} does not broadcast to input's {tuple(input.shape)}"
        ) from None
    return _softmax(input, mask, scale, False)


def _check(operation: str, input: torch.Tensor, dims: int) -> None:
    check_like(operation, input)
    if input.dim() < dims:
        raise ValueError(
            f"{operation}: input has shape {tuple(input.shape)}; {dims} dim{'s are' if dims > 1 else ' is'} needed"
        )


def _forward_reference(input, mask, scale, causal):
    logits = input.float().contiguous() * scale
    if causal:
        queries, length = logits.shape[-2:]
        mask = torch.ones(queries, length, dtype=torch.bool, device=input.device).triu(1 + length - queries)
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    probabilities = logits.softmax(-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0)
    # A NaN that a query sees does not reach the columns after it.
    return (probabilities.masked_fill(mask, 0) if causal else probabilities).to(input.dtype)


def _backward_reference(gradient, output, scale, causal):
    y, dy = output.float(), gradient.float()
    if causal:
        queries, length = y.shape[-2:]
        y, dy = (values.tril(length - queries) for values in (y, dy))
    dx = scale * (y * (dy - (y * dy).sum(-1, keepdim=True)))
    return (dx.tril(length - queries) if causal else dx).contiguous().to(output.dtype)


def _forward_fake(input, mask, scale, causal):
    return input.new_empty(input.shape)


def _backward_fake(gradient, output, scale, causal):
    return output.new_empty(output.shape)


def _setup_context(ctx, inputs, output):
    _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _backward(ctx, gradient):
    return _softmax_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None, None


_softmax_backward = define(
    "softmax_backward(Tensor gradient, Tensor output, float scale, bool causal) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
)
_softmax = define(
    "softmax(Tensor input, Tensor? mask, float scale, bool causal) -> Tensor",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
