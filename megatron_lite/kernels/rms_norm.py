"""RMS norm over the last dim, alone or of a sum with the residual. The formula is in csrc/rms_norm/rms_norm.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import as_rows, check_last_dim, check_like, check_same_shape
from megatron_lite.kernels.operators import define


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-5, *, memory_efficient: bool = False
) -> torch.Tensor:
    """input / sqrt(mean of input^2 + epsilon) * weight over the last dim.

    input: [..., H], fp32, bf16 or fp16, any strides; weight: [H] of the same dtype and device. Gives a
    contiguous [..., H]. fp32 inside, rounded once. Differentiable once; its gradients repeat bit for bit
    whatever the number of threads. A NaN or an infinity makes its row NaN, and so do finite values whose squares sum to
    more than fp32 holds, 3.4e38, where torch gives zeros. Raises TypeError for a dtype and ValueError for a shape or
    device that will not do. Zhang and Sennrich 2019.

    With `memory_efficient` the output is kept for the gradient instead of the input (apex's option): nothing more,
    where the next layer keeps it anyway. The normalised value is then output / weight, off by half a digit of
    itself, however small the weight, as long as the output is no denormal; a weight of 0 makes the gradients NaN,
    never a wrong number.
    """
    check_like("rms_norm", input, weight=weight)
    check_last_dim("rms_norm", input, weight=weight)
    return _rms_norm(input, weight, epsilon, memory_efficient)[0]


def residual_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float = 1e-5,
    *,
    memory_efficient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The RMS norm of input + residual, and that sum, in one pass over memory.

    As `rms_norm`; residual: [..., H] like input. The norm is of the sum as rounded to the dtype, so it equals
    `rms_norm(input + residual, ...)`.
    """
    check_like("residual_rms_norm", input, residual=residual, weight=weight)
    check_same_shape("residual_rms_norm", input, residual=residual)
    check_last_dim("residual_rms_norm", input, weight=weight)
    output, total, _ = _residual_rms_norm(input, residual, weight, epsilon, memory_efficient)
    return output, total


def _forward_reference(input, weight, epsilon, memory_efficient):
    values = input.float().contiguous()
    mean_square = values.square().mean(-1, keepdim=True)
    inverse = torch.rsqrt(mean_square.masked_fill(mean_square.isinf(), torch.nan) + epsilon)
    return (values * inverse * weight.float()).to(input.dtype), inverse.flatten()


def _residual_forward_reference(input, residual, weight, epsilon, memory_efficient):
    total = (input.float() + residual.float()).to(input.dtype).contiguous()
    output, inverse = _forward_reference(total, weight, epsilon, memory_efficient)
    return output, total, inverse


def _backward_reference(gradient, sum_gradient, kept, weight, inverse, from_output):
    dy, values = as_rows(gradient), as_rows(kept)
    normal = values / weight.float() if from_output else values * inverse[:, None]
    g = dy * weight.float()
    dx = inverse[:, None] * (g - normal * (g * normal).mean(-1, keepdim=True))
    if sum_gradient is not None:
        dx = dx + as_rows(sum_gradient)
    return dx.view(kept.shape).to(kept.dtype), (dy * normal).sum(0).to(weight.dtype)


def _forward_fake(input, weight, epsilon, memory_efficient):
    return input.new_empty(input.shape), input.new_empty(input.shape[:-1].numel(), dtype=torch.float32)


def _residual_forward_fake(input, residual, weight, epsilon, memory_efficient):
    output, inverse = _forward_fake(input, weight, epsilon, memory_efficient)
    return output, torch.empty_like(output), inverse


def _backward_fake(gradient, sum_gradient, kept, weight, inverse, from_output):
    return kept.new_empty(kept.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    input, weight, _, ctx.from_output = inputs
    result, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.save_for_backward(result if ctx.from_output else input, weight, inverse)


def _residual_setup_context(ctx, inputs, output):
    _, _, weight, _, ctx.from_output = inputs
    result, total, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.save_for_backward(result if ctx.from_output else total, weight, inverse)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, inverse_gradient):
    return *_rms_norm_backward(gradient, None, *ctx.saved_tensors, ctx.from_output), None, None


def _residual_backward(ctx, gradient, sum_gradient, inverse_gradient):
    if gradient is None:
        return sum_gradient, sum_gradient, None, None, None
    dx, dw = _rms_norm_backward(gradient, sum_gradient, *ctx.saved_tensors, ctx.from_output)
    return dx, dx, dw, None, None


_rms_norm_backward = define(
    "rms_norm_backward(Tensor gradient, Tensor? sum_gradient, Tensor kept, Tensor weight, Tensor inverse, "
    "bool from_output) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_rms_norm = define(
    "rms_norm(Tensor input, Tensor weight, float epsilon, bool memory_efficient) -> (Tensor, Tensor)",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_residual_rms_norm = define(
    "residual_rms_norm(Tensor input, Tensor residual, Tensor weight, float epsilon, bool memory_efficient) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_residual_forward_reference,
    fake=_residual_forward_fake,
    setup_context=_residual_setup_context,
    backward=_residual_backward,
)
