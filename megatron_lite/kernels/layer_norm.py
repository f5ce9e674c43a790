"""Layer norm over the last dim, alone or of a sum with the residual. The formula is in csrc/layer_norm/layer_norm.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import as_rows, check_last_dim, check_like, check_same_shape
from megatron_lite.kernels.operators import define


def layer_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float = 1e-5,
    *,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """(input - mean) / sqrt(variance + epsilon) * weight + bias over the last dim.

    input: [..., H], fp32, bf16 or fp16, any strides; weight, bias: [H] of the same dtype and device. Gives a
    contiguous [..., H]. fp32 inside, rounded once. Differentiable once; its gradients repeat bit for bit
    whatever the number of threads. A NaN or an infinity makes its row NaN, and so do finite values whose squared
    distances from the mean sum to more than fp32 holds, 3.4e38. Raises TypeError for a dtype and ValueError for a
    shape or device that will not do. Ba, Kiros and Hinton 2016.

    With `memory_efficient` the output is kept for the gradient instead of the input (apex's option): nothing more,
    where the next layer keeps it anyway. The normalised value is then (output - bias) / weight, and off by the
    output's rounding: by half a digit of |value| + |bias / weight|. That is as good as any other rounding while no
    weight is much smaller than its bias; a weight of 0 makes the gradients NaN, never a wrong number.
    """
    check_like("layer_norm", input, weight=weight, bias=bias)
    check_last_dim("layer_norm", input, weight=weight, bias=bias)
    return _layer_norm(input, weight, bias, epsilon, memory_efficient)[0]


def residual_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float = 1e-5,
    *,
    memory_efficient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer norm of input + residual, and that sum, in one pass over memory.

    As `layer_norm`; residual: [..., H] like input. The norm is of the sum as rounded to the dtype, so it equals
    `layer_norm(input + residual, ...)`.
    """
    check_like("residual_layer_norm", input, residual=residual, weight=weight, bias=bias)
    check_same_shape("residual_layer_norm", input, residual=residual)
    check_last_dim("residual_layer_norm", input, weight=weight, bias=bias)
    output, total, _, _ = _residual_layer_norm(input, residual, weight, bias, epsilon, memory_efficient)
    return output, total


def _forward_reference(input, weight, bias, epsilon, memory_efficient):
    values = input.float().contiguous()
    mean = values.mean(-1, keepdim=True)
    centred = values - mean
    variance = centred.square().mean(-1, keepdim=True)
    inverse = torch.rsqrt(variance.masked_fill(variance.isinf(), torch.nan) + epsilon)
    output = (centred * inverse * weight.float() + bias.float()).to(input.dtype)
    return output, mean.flatten(), inverse.flatten()


def _residual_forward_reference(input, residual, weight, bias, epsilon, memory_efficient):
    total = (input.float() + residual.float()).to(input.dtype).contiguous()
    output, mean, inverse = _forward_reference(total, weight, bias, epsilon, memory_efficient)
    return output, total, mean, inverse


def _backward_reference(gradient, sum_gradient, kept, weight, bias, mean, inverse):
    dy, values = as_rows(gradient), as_rows(kept)
    if bias is None:
        normal = (values - mean[:, None]) * inverse[:, None]
    else:
        normal = (values - bias.float()) / weight.float()
    g = dy * weight.float()
    dx = inverse[:, None] * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    if sum_gradient is not None:
        dx = dx + as_rows(sum_gradient)
    return dx.view(kept.shape).to(kept.dtype), (dy * normal).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def _forward_fake(input, weight, bias, epsilon, memory_efficient):
    rows = input.new_empty(input.shape[:-1].numel(), dtype=torch.float32)
    return input.new_empty(input.shape), rows, torch.empty_like(rows)


def _residual_forward_fake(input, residual, weight, bias, epsilon, memory_efficient):
    output, mean, inverse = _forward_fake(input, weight, bias, epsilon, memory_efficient)
    return output, torch.empty_like(output), mean, inverse


def _backward_fake(gradient, sum_gradient, kept, weight, bias, mean, inverse):
    return kept.new_empty(kept.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    input, weight, bias, _, memory_efficient = inputs
    result, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    kept, bias = (result, bias) if memory_efficient else (input, None)
    ctx.save_for_backward(kept, weight, bias, mean, inverse)


def _residual_setup_context(ctx, inputs, output):
    _, _, weight, bias, _, memory_efficient = inputs
    result, total, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    kept, bias = (result, bias) if memory_efficient else (total, None)
    ctx.save_for_backward(kept, weight, bias, mean, inverse)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, mean_gradient, inverse_gradient):
    return *_layer_norm_backward(gradient, None, *ctx.saved_tensors), None, None


def _residual_backward(ctx, gradient, sum_gradient, mean_gradient, inverse_gradient):
    if gradient is None:
        return sum_gradient, sum_gradient, None, None, None, None
    dx, dw, db = _layer_norm_backward(gradient, sum_gradient, *ctx.saved_tensors)
    return dx, dx, dw, db, None, None


_layer_norm_backward = define(
    "layer_norm_backward(Tensor gradient, Tensor? sum_gradient, Tensor kept, Tensor weight, Tensor? bias, Tensor mean, "
    "Tensor inverse) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_layer_norm = define(
    "layer_norm(Tensor input, Tensor weight, Tensor bias, float epsilon, bool memory_efficient) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_residual_layer_norm = define(
    "residual_layer_norm(Tensor input, Tensor residual, Tensor weight, Tensor bias, float epsilon, "
    "bool memory_efficient) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_residual_forward_reference,
    fake=_residual_forward_fake,
    setup_context=_residual_setup_context,
    backward=_residual_backward,
)
