"""Activations computed again in backward instead of kept (Chen et al. 2016).

No random state is saved: every dropout mask is a function of its site (see `parallel/random.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Recompute:
    """What is recomputed: nothing, the attention core ("selective", Korthikanti et al. 2022), or layers.

    "full" with "uniform" keeps the input of every group of `num_layers` layers; with "block" it
    recomputes the first `num_layers` layers one by one and keeps the activations of the others.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, run again in backward; run plainly where no gradient is recorded."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def run_layers(
    layers: Sequence[Callable[..., torch.Tensor]], hidden: torch.Tensor, recompute: Recompute, *arguments: Any
) -> torch.Tensor:
    """`hidden` after each of `layers` in turn, called as `layer(hidden, *arguments)`."""
    for group, again in _groups(layers, recompute):
        hidden = recomputed(_chain, group, hidden, *arguments) if again else _chain(group, hidden, *arguments)
    return hidden


def _groups(layers: Sequence[Callable], recompute: Recompute) -> list[tuple[Sequence[Callable], bool]]:
    if recompute.granularity != "full":
        return [(layers, False)]
    length = recompute.num_layers
    if recompute.method == "uniform":
        return [(layers[first : first + length], True) for first in range(0, len(layers), length)]
    return [((layer,), True) for layer in layers[:length]] + [(layers[length:], False)]


def _chain(layers: Sequence[Callable], hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden, *arguments)
    return hidden
