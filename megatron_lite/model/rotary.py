"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch


class Rotary:
    """Cosines and sines by position, made once for each device and grown when a longer sequence comes.

    `width` values of each head are rotated (an even number), with frequencies base^(-2i / width). Angles
    are fp64 before they are rounded to fp32: at position 10^5 an fp32 angle is off by 4e-3.
    """

    def __init__(self, width: int, base: float):
        if width % 2:
            raise ValueError(f"rotary embedding turns pairs, and {width} values a head are not even")
        self.width, self._base = width, base
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def tables(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) of positions [start, stop), each fp32 [S, 1, 1, width / 2]."""
        self._prepare(stop, device)
        cosines, sines = self._tables
        return cosines[start:stop], sines[start:stop]

    def tables_at(self, positions_SB: torch.Tensor, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines) of `positions_SB`, all below `stop`, each fp32 [S, B, 1, width / 2]."""
        self._prepare(stop, positions_SB.device)
        cosines, sines = self._tables
        return cosines[:, 0][positions_SB], sines[:, 0][positions_SB]

    def _prepare(self, stop: int, device: torch.device) -> None:
        if self._tables is None or self._tables[0].shape[0] < stop or self._tables[0].device != device:
            exponents = torch.arange(0, self.width, 2, dtype=torch.float64, device=device) / self.width
            angles = torch.outer(torch.arange(stop, dtype=torch.float64, device=device), self._base**-exponents)
            angles = angles[:, None, None, :]
            self._tables = angles.cos().float(), angles.sin().float()


class _Rotate(torch.autograd.Function):
    """A rotation of pairs; its backward is the rotation by the opposite angles, so nothing else is saved."""

    @staticmethod
    def forward(ctx, heads, cosines, sines, interleaved):
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        return _rotated(heads, cosines, sines, interleaved)

    @staticmethod
    def backward(ctx, gradient):
        cosines, sines = ctx.saved_tensors
        return _Rotate.apply(gradient, cosines, -sines, ctx.interleaved), None, None, None


def _rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width = 2 * cosines.shape[-1]
    output = torch.empty_like(heads, memory_format=torch.contiguous_format)
    if interleaved:
        pairs, turned = heads[..., :width].unflatten(-1, (-1, 2)), output[..., :width].unflatten(-1, (-1, 2))
        (first, second), (first_out, second_out) = pairs.unbind(-1), turned.unbind(-1)
    else:
        first, second = heads[..., :width].chunk(2, -1)
        first_out, second_out = output[..., :width].chunk(2, -1)
    first_out.copy_(first * cosines - second * sines)
    second_out.copy_(second * cosines + first * sines)
    output[..., width:] = heads[..., width:]
    return output


def apply_rope(
    heads_SBND: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], *, interleaved: bool
) -> torch.Tensor:
    """`heads_SBND` with the first values of each head rotated by `tables`, computed in fp32.

    Pairs are (i, i + width / 2), or neighbours (2i, 2i + 1) if `interleaved` (GPT-J).
    """
    return _Rotate.apply(heads_SBND, *tables, interleaved)
