"""GELU of a sum with a bias, by the tanh formula or exact. The formulas are in csrc/bias_gelu/bias_gelu.h."""

from __future__ import annotations

import math

import torch

from megatron_lite.kernels.arguments import as_rows, check_last_dim, check_like
from megatron_lite.kernels.operators import define


def bias_gelu(input: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "tanh") -> torch.Tensor:
    """gelu(input + bias), in one pass over memory.

    input: [..., F], fp32, bf16 or fp16, any strides; bias: [F] of the same dtype and device, or none. `approximate`
    is "tanh" (GPT-2's formula) or "none" (exact), as in `torch.nn.functional.gelu`. Gives a contiguous [..., F]. fp32
    inside, the sum with the bias included, rounded once; only the input is kept for the gradient. Differentiable
    once; the bias's gradient repeats bit for bit whatever the number of threads. A NaN reaches the one value made
    from it (and the bias's gradient); -inf gives NaN, as in torch, but the slope there is 0 and at inf 1. Raises
    TypeError for a dtype and ValueError for a shape, device or formula that will not do. Hendrycks and Gimpel 2016.
    """
    others = {} if bias is None else {"bias": bias}
    check_like("bias_gelu", input, **others)
    check_last_dim("bias_gelu", input, **others)
    if approximate not in ("tanh", "none"):
        raise ValueError(f'bias_gelu: approximate is {approximate!r}; "tanh" and "none" (exact) are possible')
    return _bias_gelu(input, bias, approximate == "tanh")


def _sum(input, bias):
    return (input.float() if bias is None else input.float() + bias.float()).contiguous()


def _forward_reference(input, bias, tanh):
    z = _sum(input, bias)
    # By torch's own gelu the exact one is NaN of +inf, and infinite where z / sqrt(2) overflows.
    output = torch.nn.functional.gelu(z, approximate="tanh") if tanh else z * torch.special.ndtr(z)
    return output.to(input.dtype)


def _backward_reference(gradient, input, bias, tanh):
    z = _sum(input, bias).clamp(-30, 30)
    if tanh:
        slope = 2 * math.sqrt(2 / math.pi)
        u = slope * z * (1 + 0.044715 * z * z)
        s = torch.sigmoid(u)
        slopes = s + z * s * torch.sigmoid(-u) * slope * (1 + 3 * 0.044715 * z * z)
    else:
        slopes = torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    dx = gradient.float().contiguous() * slopes
    db = input.new_empty(0) if bias is None else as_rows(dx).sum(0).to(bias.dtype)
    return dx.to(input.dtype), db


def _forward_fake(input, bias, tanh):
    return input.new_empty(input.shape)


def _backward_fake(gradient, input, bias, tanh):
    return input.new_empty(input.shape), input.new_empty(0 if bias is None else bias.shape[0])


def _setup_context(ctx, inputs, output):
    input, bias, ctx.tanh = inputs
    ctx.save_for_backward(input, bias)


def _backward(ctx, gradient):
    input, bias = ctx.saved_tensors
    dx, db = _bias_gelu_backward(gradient, input, bias, ctx.tanh)
    return dx, None if bias is None else db, None


_bias_gelu_backward = define(
    "bias_gelu_backward(Tensor gradient, Tensor input, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_bias_gelu = define(
    "bias_gelu(Tensor input, Tensor? bias, bool tanh) -> Tensor",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
