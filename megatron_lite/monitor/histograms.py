"""Histograms of weights and gradients, counted on the device that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's finite values in buckets of equal width, in TensorBoard's terms."""

    min: float
    max: float
    num: int
    sum: float
    sum_squares: float
    bucket_limits: list[float]
    """Upper end of each bucket."""
    bucket_counts: list[float]


def histogram(values: torch.Tensor, buckets: int = 64) -> Histogram | None:
    """The histogram of the finite elements of `values`; None where there is none."""
    import torch

    flat = values.detach().reshape(-1).float()
    flat = flat[torch.isfinite(flat)]
    if flat.numel() == 0:
        return None
    low, high = torch.aminmax(flat)
    # Sums in float64: a billion squares do not fit the precision of fp32.
    moments = torch.stack([low.double(), high.double(), flat.sum(dtype=torch.float64), flat.double().square().sum()])
    low, high, total, squares = moments.tolist()
    if low == high:
        return Histogram(low, high, flat.numel(), total, squares, [high], [float(flat.numel())])
    counts = torch.histc(flat, buckets, low, high).tolist()
    width = (high - low) / buckets
    limits = [low + width * (i + 1) for i in range(buckets - 1)] + [high]
    return Histogram(low, high, flat.numel(), total, squares, limits, counts)


def histograms(
    weights: Iterable[tuple[str, torch.Tensor]], gradients: Iterable[tuple[str, torch.Tensor | None]] = ()
) -> dict[str, Histogram]:
    """Histograms by tag: `weights/NAME` and `gradients/NAME`, empty and absent tensors left out."""
    found = {}
    for group, tensors in (("weights", weights), ("gradients", gradients)):
        for name, tensor in tensors:
            counted = None if tensor is None else histogram(tensor)
            if counted is not None:
                found[f"{group}/{name}"] = counted
    return found
