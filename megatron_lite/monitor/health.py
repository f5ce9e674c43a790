"""What is wrong with a run that stops being finite, told by step, rank and parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Named = Iterable[tuple[str, "torch.Tensor | None"]]


def first_non_finite(tensors: Named) -> tuple[str, int, int] | None:
    """Name, number of NaN or infinite elements, and elements of the first tensor that has any."""
    import torch

    for name, tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            odd = tensor.numel() - int(torch.isfinite(tensor).sum())
            if odd:
                return name, odd, tensor.numel()
    return None


def describe(
    loss: float, *, step: int, rank: int, weights: Named = (), gradients: Named = (), what: str = "loss"
) -> str:
    """The sentences of a non-finite loss: where it arose, what is the first tensor hurt, what to do."""
    for kind, tensors in (("weight", weights), ("gradient", gradients)):
        found = first_non_finite(tensors)
        if found is not None:
            name, odd, elements = found
            culprit = f"the first non-finite {kind} is {name} ({odd:,} of {elements:,} elements)"
            break
    else:
        culprit = "all weights and gradients on this rank are finite, so an activation overflowed in this step"
    return (
        f"step {step}: the {what} is {loss} on rank {rank}; {culprit}. Go back to the last checkpoint with a lower "
        f"--lr, a longer warm-up or a smaller --clip-grad, or leave the samples of this step out by --skip-samples A:B"
    )
