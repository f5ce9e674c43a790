"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The rotation of heads at some positions.

    `cosines` [S, B or 1, 1, D] has one for each value of a head, 1 where it is not rotated; `sines`
    [S, B or 1, 1, width / 2] one for each pair. Both fp32.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    interleaved: bool

    def __call__(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """`heads_SBND` rotated, computed in fp32."""
        return _Rotate.apply(heads_SBND, self.cosines, self.sines, self.interleaved)


class Rotary:
    """Cosines and sines by position, made once for each device and grown when a longer sequence comes.

    The first `width` of the `head_dim` values of each head are rotated in pairs, with frequencies
    base^(-2i / width). Pairs are (i, i + width / 2), or neighbours (2i, 2i + 1) if `interleaved` (GPT-J).
    Angles are fp64 before they are rounded to fp32: at position 10^5 an fp32 angle is off by 4e-3.
    Raises ValueError for an odd width.
    """

    def __init__(self, head_dim: int, width: int, base: float, *, interleaved: bool = False):
        if width % 2:
            raise ValueError(f"rotary embedding turns pairs, and {width} values a head are not even")
        self._head_dim, self._width, self._base, self._interleaved = head_dim, width, base, interleaved
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def between(self, start: int, stop: int, device: torch.device) -> Rotation:
        """The rotation of positions [start, stop)."""
        cosines, sines = self._tables_until(stop, device)
        return Rotation(cosines[start:stop], sines[start:stop], self._interleaved)

    def at(self, positions_SB: torch.Tensor, stop: int) -> Rotation:
        """The rotation of `positions_SB`, all below `stop`."""
        cosines, sines = self._tables_until(stop, positions_SB.device)
        return Rotation(cosines[:, 0][positions_SB], sines[:, 0][positions_SB], self._interleaved)

    def _tables_until(self, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None or len(self._tables[0]) < stop or self._tables[0].device != device:
            exponents = torch.arange(0, self._width, 2, dtype=torch.float64, device=device) / self._width
            angles = torch.outer(torch.arange(stop, dtype=torch.float64, device=device), self._base**-exponents)
            cosines = torch.ones(stop, 1, 1, self._head_dim, device=device)
            for values in _pairs(cosines, self._width, self._interleaved):
                values.copy_(angles.cos()[:, None, None])
            self._tables = cosines, angles.sin().float()[:, None, None]
        return self._tables


class _Rotate(torch.autograd.Function):
    """A rotation of pairs; its backward is the rotation by the opposite angles, so no activation is saved."""

    @staticmethod
    def forward(ctx, heads, cosines, sines, interleaved):
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        values = heads.float()
        output = values * cosines
        first, second = _pairs(values, 2 * sines.shape[-1], interleaved)
        first_out, second_out = _pairs(output, 2 * sines.shape[-1], interleaved)
        first_out.addcmul_(second, sines, value=-1)
        second_out.addcmul_(first, sines)
        return output.to(heads.dtype)

    @staticmethod
    def backward(ctx, gradient):
        cosines, sines = ctx.saved_tensors
        return _Rotate.apply(gradient, cosines, -sines, ctx.interleaved), None, None, None


def _pairs(heads: torch.Tensor, width: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second values of all pairs."""
    if interleaved:
        return heads[..., 0:width:2], heads[..., 1:width:2]
    return heads[..., : width // 2], heads[..., width // 2 : width]
