"""SwiGLU of the two halves of the last dim. The formula is in csrc/swiglu/swiglu.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import check_like
from megatron_lite.kernels.operators import define


def swiglu(input: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the gate is the first half of the last dim and up the second.

    input: [..., 2 F], fp32, bf16 or fp16, any strides. Gives a contiguous [..., F]. fp32 inside, rounded once;
    only the input is kept for the gradient, which is written for both halves at once. Differentiable once. A NaN
    reaches the values made from it and no others; a gate of -inf gives NaN, as in torch. Raises TypeError for a
    dtype and ValueError for an odd last dim. Shazeer 2020.
    """
    check_like("swiglu", input)
    if input.dim() == 0 or input.shape[-1] % 2:
        raise ValueError(f"swiglu: input has shape {tuple(input.shape)}; the last dim must be even: a gate and as much")
    return _swiglu(input)


def _forward_reference(input):
    gate, up = input.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype).contiguous()


def _backward_reference(gradient, input):
    gate, up = input.float().chunk(2, -1)
    dy, s = gradient.float(), torch.sigmoid(gate)
    return torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), -1).to(input.dtype).contiguous()


def _forward_fake(input):
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


def _backward_fake(gradient, input):
    return input.new_empty(input.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return _swiglu_backward(gradient, *ctx.saved_tensors)


_swiglu_backward = define(
    "swiglu_backward(Tensor gradient, Tensor input) -> Tensor", reference=_backward_reference, fake=_backward_fake
)
_swiglu = define(
    "swiglu(Tensor input) -> Tensor",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
