"""Rotary position embedding of attention heads. The formula is in csrc/rotary/rotary.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import check_like
from megatron_lite.kernels.operators import define


def rotary(
    heads: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    overwrite_gradient: bool = False,
) -> torch.Tensor:
    """The heads with the first 2 P of their D values turned in pairs, the rest as they are.

    heads: [S, B, N, D], fp32, bf16 or fp16, any strides; cosines, sines: [S, B or 1, P], fp32, on the same device.
    Pairs are (i, i + P), or neighbours (2i, 2i + 1) if `interleaved`; `inverse` turns by the opposite angles. Gives a
    contiguous [S, B, N, D]. fp32 inside, rounded once; only the tables are kept for the gradient, which is the
    inverse rotation and differentiable again; the tables have none. With `overwrite_gradient` a contiguous gradient
    is turned in place: for where whoever makes it gives it to nobody else. A NaN or an infinity reaches the two
    values of its pair. Raises TypeError for a dtype and ValueError for a shape or device that will not do. Su et al.
    2021; neighbours as in GPT-J.
    """
    check_like("rotary", heads)
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table.dtype != torch.float32:
            raise TypeError(f"rotary: {name} are {table.dtype}; float32 is needed")
        if table.device != heads.device:
            raise ValueError(f"rotary: {name} are on {table.device} and heads on {heads.device}; move one")
    fits = heads.dim() == 4 and cosines.dim() == 3 and cosines.shape == sines.shape
    if fits:
        positions, batch, _, size = heads.shape
        fits = cosines.shape[:2] in ((positions, batch), (positions, 1)) and 2 * cosines.shape[2] <= size
    if not fits:
        raise ValueError(
            f"rotary: heads have shape {tuple(heads.shape)}, cosines {tuple(cosines.shape)}, sines "
            f"{tuple(sines.shape)}; (S, B, N, D) and two tables of (S, B or 1, at most D / 2) are needed"
        )
    return _rotary(heads, cosines, sines, interleaved, inverse, overwrite_gradient)


def _pairs(heads, pairs, interleaved):
    """Views of the first and of the second values of all pairs."""
    if interleaved:
        return heads[..., 0 : 2 * pairs : 2], heads[..., 1 : 2 * pairs : 2]
    return heads[..., :pairs], heads[..., pairs : 2 * pairs]


def _reference(heads, cosines, sines, interleaved, inverse, overwrite_gradient=False):
    cosines, sines = cosines.unsqueeze(2), (-sines if inverse else sines).unsqueeze(2)
    first, second = _pairs(heads.float(), cosines.shape[-1], interleaved)
    output = heads.clone(memory_format=torch.contiguous_format)
    first_out, second_out = _pairs(output, cosines.shape[-1], interleaved)
    first_out.copy_(first * cosines - second * sines)
    second_out.copy_(second * cosines + first * sines)
    return output


def _reference_in_place(heads, *rotation):
    heads.copy_(_reference(heads, *rotation))


def _fake(heads, *rotation):
    return heads.new_empty(heads.shape)


def _fake_in_place(heads, *rotation):
    return None


def _setup_context(ctx, inputs, output):
    _, cosines, sines, ctx.interleaved, ctx.inverse, ctx.overwrite_gradient = inputs
    ctx.save_for_backward(cosines, sines)


def _backward(ctx, gradient):
    rotation = *ctx.saved_tensors, ctx.interleaved, not ctx.inverse
    # A gradient of other strides is copied on its way to what made the heads: the rotation does that on the way.
    if ctx.overwrite_gradient and gradient.is_contiguous() and not torch.is_grad_enabled():
        _rotary_in_place(gradient, *rotation)
    else:
        gradient = _rotary(gradient, *rotation, False)
    return gradient, None, None, None, None, None


_rotary_in_place = define(
    "rotary_(Tensor(a!) heads, Tensor cosines, Tensor sines, bool interleaved, bool inverse) -> ()",
    reference=_reference_in_place,
    fake=_fake_in_place,
)
_rotary = define(
    "rotary(Tensor heads, Tensor cosines, Tensor sines, bool interleaved, bool inverse, bool overwrite_gradient) "
    "-> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
