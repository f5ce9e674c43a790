"""What one forward pass hands to every layer."""

from __future__ import annotations

import dataclasses
import enum

import torch

from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.rotary import Rotation
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.random import dropout, mix


class Site(enum.IntEnum):
    """A place of dropout; the numbers are part of every mask's seed."""

    EMBEDDING = 0
    ATTENTION_PROBABILITIES = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """What one forward pass hands to every layer.

    `dropout_seed` is the micro-batch's, None for no dropout. `rotation` is that of
    the tokens' positions. `mask` [B, 1, S, S so far] says which keys a query sees, where causality alone does not.
    """

    axis: TensorAxis
    dropout_seed: int | None = None
    rotation: Rotation | None = None
    mask: torch.Tensor | None = None
    cache: KeyValueCache | None = None

    def seed(self, layer: int, site: Site, *, differs: bool) -> int | None:
        """The seed of one dropout site: of each tensor rank if its activations differ, else of all."""
        if self.dropout_seed is None:
            return None
        return mix(self.dropout_seed, layer, site, 1 + self.axis.rank if differs else 0)

    def dropout(self, hidden_SBH: torch.Tensor, probability: float, layer: int, site: Site) -> torch.Tensor:
        """Dropout between split regions: the same on all tensor ranks unless each has a part of the sequence."""
        if probability == 0.0:
            return hidden_SBH
        return dropout(hidden_SBH, probability, self.seed(layer, site, differs=self.axis.sequence_parallel))
