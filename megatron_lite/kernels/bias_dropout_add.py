"""Dropout of a sum with a bias, added to the residual. Formulas and mask: csrc/bias_dropout_add/bias_dropout_add.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import as_rows, check_last_dim, check_like, check_same_shape
from megatron_lite.kernels.operators import define

_WORD = 0xFFFFFFFF


def bias_dropout_add(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    probability: float,
    seed: int,
    *,
    first: int = 0,
) -> torch.Tensor:
    """residual + dropout(input + bias), in one pass over memory.

    input, residual: [..., H], fp32, bf16 or fp16, any strides; bias: [H] of the same dtype and device. Without bias
    or residual nothing is added, so dropout alone is `bias_dropout_add(input, None, None, ...)`. An element is 0 with
    `probability`, else 1 / (1 - probability) times itself. Which ones is a function of the seed (64 bits) and of
    `first` + the element's number in the tensor, the same on every device and when computed again: the rank that holds
    a part of a larger tensor gives the number of its first element, and so has its part of that tensor's mask.
    Gives a contiguous [..., H]. fp32 inside, rounded once; nothing is kept for the gradient. Differentiable once with
    a bias, whose gradient repeats bit for bit whatever the number of threads. A NaN or an infinity reaches the one
    value made from it (and the bias's gradient); a dropped one does not. Raises TypeError for a dtype and ValueError
    for a shape, device, probability or first that will not do. Srivastava et al. 2014; the mask is Philox-4x32-7
    (Salmon et al. 2011).
    """
    others = {name: tensor for name, tensor in (("bias", bias), ("residual", residual)) if tensor is not None}
    check_like("bias_dropout_add", input, **others)
    check_last_dim("bias_dropout_add", input, **({} if bias is None else {"bias": bias}))
    check_same_shape("bias_dropout_add", input, **({} if residual is None else {"residual": residual}))
    if not 0 <= probability < 1:
        raise ValueError(f"bias_dropout_add: probability is {probability}; at least 0 and less than 1 is possible")
    if first < 0:
        raise ValueError(f"bias_dropout_add: first is {first}; it counts elements from 0")
    # A schema's integers are signed.
    seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return _bias_dropout_add(input, bias, residual, probability, seed, first)


def _philox(counters, key):
    """Four words of each counter, [counters, 4]: int64 that hold 32 bits each."""
    a, b = counters & _WORD, counters >> 32 & _WORD
    c = d = torch.zeros_like(counters)
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(7):
        # The products may pass 2^63: the sign bit that int64 makes of the last one is masked off again.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ low,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ high,
            first & _WORD,
        )
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return torch.stack((a, b, c, d), 1)


def _dropped(values, probability, seed, first):
    if probability == 0:
        return values
    count = values.numel()
    counters = torch.arange(first // 4, (first + count + 3) // 4, device=values.device)
    words = _philox(counters, seed).flatten()[first % 4 :][:count].view(values.shape)
    scaled = values * (1 / (1 - probability))
    return scaled.masked_fill_(words < min(int(probability * 2**32), _WORD), 0)


def _forward_reference(input, bias, residual, probability, seed, first):
    values = (input.float() if bias is None else input.float() + bias.float()).contiguous()
    values = _dropped(values, probability, seed, first)
    # What was added may have other strides, or be the input itself.
    output = values if residual is None else values + residual.float()
    return torch.empty_like(input, memory_format=torch.contiguous_format).copy_(output)


def _backward_reference(gradient, probability, seed, first):
    dx = _dropped(gradient.float().contiguous(), probability, seed, first)
    db = as_rows(dx).sum(0).to(gradient.dtype)
    return dx.to(gradient.dtype, copy=True) if probability else gradient.new_empty(0), db


def _forward_fake(input, *others):
    return input.new_empty(input.shape)


def _backward_fake(gradient, probability, seed, first):
    return gradient.new_empty(gradient.shape if probability else 0), gradient.new_empty(gradient.shape[-1])


def _setup_context(ctx, inputs, output):
    _, bias, residual, *ctx.mask = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None


def _backward(ctx, gradient):
    dx, db = gradient, None
    if ctx.has_bias:
        dropped, db = _bias_dropout_add_backward(gradient, *ctx.mask)
        if ctx.mask[0]:
            dx = dropped
    elif ctx.mask[0]:
        dx = _bias_dropout_add(gradient, None, None, *ctx.mask)
    return dx, db, gradient if ctx.has_residual else None, None, None, None


_bias_dropout_add_backward = define(
    "bias_dropout_add_backward(Tensor gradient, float probability, SymInt seed, SymInt first) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_bias_dropout_add = define(
    "bias_dropout_add(Tensor input, Tensor? bias, Tensor? residual, float probability, SymInt seed, SymInt first) "
    "-> Tensor",
    reference=_forward_reference,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
