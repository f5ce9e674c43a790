"""What is wrong with a run that stops being finite, told by step, rank and parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Hurt(NamedTuple):
    """A tensor of one rank that is not finite. The least of several is the first one: weights before
    gradients, in the order of the model's parameters, then by rank."""

    is_gradient: bool
    index: int
    """Of the parameter, in the order it was looked at."""
    rank: int
    name: str
    odd: int
    """NaN or infinite elements."""
    elements: int


def first_hurt(tensors: Iterable[tuple[str, torch.Tensor]], rank: int, is_gradient: bool) -> Hurt | None:
    """The first of `tensors` that is not finite, if any; goes through all, since getting one may be collective."""
    import torch

    found = None
    for index, (name, tensor) in enumerate(tensors):
        if found is None and (odd := tensor.numel() - int(torch.isfinite(tensor).sum())):
            found = Hurt(is_gradient, index, rank, name, odd, tensor.numel())
    return found


def describe(
    value: float,
    *,
    step: int,
    what: str = "loss",
    ranks: Sequence[int] = (),
    hurt: Hurt | None = None,
    data_size: int = 1,
    holds_gradients: bool = True,
) -> str:
    """The sentences of a non-finite value: where it arose, what is the first tensor hurt, what to do.

    `ranks` are those whose own share of `value` is not finite, if there are shares. A gradient is a sum over
    `data_size` ranks, of which any may have made it so; without `holds_gradients` none could be looked at.
    """
    arose = f" on rank {ranks[0]}" if ranks else ""
    if hurt is None and holds_gradients:
        culprit = f"all weights and gradients are finite, so what became the {what} overflowed in this step"
    elif hurt is None:
        culprit = "all weights are finite, and gradients are not held any more, so none can be named"
    else:
        kind = "gradient" if hurt.is_gradient else "weight"
        summed = f", summed over {data_size} data ranks" if hurt.is_gradient and data_size > 1 else ""
        culprit = (
            f"the first non-finite {kind} is {hurt.name} on rank {hurt.rank} ({hurt.odd:,} of {hurt.elements:,} "
            f"elements{summed})"
        )
    return (
        f"step {step}: the {what} is {value}{arose}; {culprit}. Go back to the last checkpoint with a lower "
        f"--lr, a longer warm-up or a smaller --clip-grad, or leave the samples of this step out by --skip-samples A:B"
    )
