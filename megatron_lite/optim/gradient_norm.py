"""The global gradient norm, exact enough in fp32 for parameters of any size."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_BLOCK = 4096
"""Elements summed in fp32: over 10^7 of them a running fp32 sum is off by 10^-3."""


def sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all elements: a fp64 scalar on `device`; blocks in fp32, their sum in fp64."""
    norms = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() - flat.numel() % _BLOCK
        if whole:
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1))
        if whole < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[whole:]).unsqueeze(0))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(norms).double().square().sum()


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most `limit`; 1 for a limit of 0."""
    return limit / (norm + 1e-6) if 0.0 < limit < norm else 1.0
