"""The global gradient norm, exact to fp32 for parameters of any size and dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_lite.kernels.l2_norm import l2_norm


def sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all elements, as the fp32 norm gives it: a fp64 scalar on `device`."""
    gradients = [tensor.detach() for tensor in tensors]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return l2_norm(gradients).double().square()


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most `limit`; 1 for a limit of 0."""
    return limit / (norm + 1e-6) if 0.0 < limit < norm else 1.0
