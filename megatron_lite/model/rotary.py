"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_lite.config.model import ModelConfig
from megatron_lite.kernels.rotary import rotary


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The rotation of heads at some positions, by fp32 cosines and sines of each pair: [S, B or 1, width / 2]."""

    cosines: torch.Tensor
    sines: torch.Tensor
    interleaved: bool

    def __call__(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """`heads_SBND` rotated, for attention alone to read: the gradient it gives back is used up."""
        return rotary(heads_SBND, self.cosines, self.sines, interleaved=self.interleaved, overwrite_gradient=True)


@dataclasses.dataclass(frozen=True)
class FrequencyScaling:
    """Slower rotary frequencies, for sequences longer than those a model was trained on before (Llama team 2024).

    Frequencies that turn less than `low` times in `original_length` tokens become `factor` times as slow, those that
    turn more than `high` times stay, and between the two it goes over evenly with the number of turns.
    """

    factor: float
    low: float
    high: float
    original_length: int

    def __call__(self, frequencies: torch.Tensor) -> torch.Tensor:
        turns = frequencies * self.original_length / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class Rotary:
    """Cosines and sines by position, made once for each device and grown when a longer sequence comes.

    The first `width` of the values of each head are rotated in pairs, with frequencies
    base^(-2i / width), which `scaling` may change. Pairs are (i, i + width / 2), or neighbours (2i, 2i + 1) if
    `interleaved` (GPT-J).
    Angles are fp64 before they are rounded to fp32: at position 10^5 an fp32 angle is off by 4e-3.
    Raises ValueError for an odd width.
    """

    def __init__(self, width: int, base: float, *, interleaved: bool = False, scaling: FrequencyScaling | None = None):
        if width % 2:
            raise ValueError(f"rotary embedding turns pairs, and {width} values a head are not even")
        self._width, self._base, self._interleaved, self._scaling = width, base, interleaved, scaling
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def between(self, start: int, stop: int, device: torch.device) -> Rotation:
        """The rotation of positions [start, stop)."""
        cosines, sines = self._tables_until(stop, device)
        return Rotation(cosines[start:stop].unsqueeze(1), sines[start:stop].unsqueeze(1), self._interleaved)

    def at(self, positions_SB: torch.Tensor, stop: int) -> Rotation:
        """The rotation of `positions_SB`, all below `stop`."""
        cosines, sines = self._tables_until(stop, positions_SB.device)
        return Rotation(cosines[positions_SB], sines[positions_SB], self._interleaved)

    def _tables_until(self, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None or len(self._tables[0]) < stop or self._tables[0].device != device:
            exponents = torch.arange(0, self._width, 2, dtype=torch.float64, device=device) / self._width
            frequencies = self._base**-exponents
            if self._scaling is not None:
                frequencies = self._scaling(frequencies)
            angles = torch.outer(torch.arange(stop, dtype=torch.float64, device=device), frequencies)
            self._tables = angles.cos().float(), angles.sin().float()
        return self._tables


def rotary_of(config: ModelConfig) -> Rotary | None:
    """The rotary embedding that a model has; None where it has another or none."""
    if config.position_embedding_type != "rope":
        return None
    scaling = None
    if config.use_rope_scaling:
        scaling = FrequencyScaling(
            config.rope_scaling_factor,
            config.rope_scaling_low_freq_factor,
            config.rope_scaling_high_freq_factor,
            config.rope_scaling_original_length,
        )
    width = int(config.head_dim * config.rotary_percent)
    return Rotary(width, config.rotary_base, interleaved=config.rotary_interleaved, scaling=scaling)
