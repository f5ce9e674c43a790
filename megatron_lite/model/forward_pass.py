"""What one forward pass hands to every layer."""

from __future__ import annotations

import dataclasses
import enum

import torch

from megatron_lite.kernels.bias_dropout_add import bias_dropout_add
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.documents import Documents
from megatron_lite.model.rotary import Rotation
from megatron_lite.parallel.context import ContextAxis
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.random import mix
from megatron_lite.parallel.ring_attention import SharedDocuments


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
    `documents`, where there are several in a sequence, are what a query sees no further than; those of whole sequences,
    or as a ring shares them.
    `context` says which tokens of a sequence this rank has.
    """

    axis: TensorAxis
    dropout_seed: int | None = None
    rotation: Rotation | None = None
    mask: torch.Tensor | None = None
    documents: Documents | SharedDocuments | None = None
    cache: KeyValueCache | None = None
    context: ContextAxis = dataclasses.field(default_factory=ContextAxis)

    def seed(self, layer: int, site: Site, *, differs: bool) -> int | None:
        """The seed of one dropout site: of each tensor and context rank if its heads differ, else of all."""
        if self.dropout_seed is None:
            return None
        place = 1 + self.axis.rank * self.context.size + self.context.rank
        return mix(self.dropout_seed, layer, site, place if differs else 0)

    def drops(self, probability: float) -> bool:
        """Whether dropout with a probability does anything in this pass."""
        return self.dropout_seed is not None and probability > 0.0

    def bias_dropout_add(
        self,
        output_SBH: torch.Tensor,
        bias: torch.Tensor | None,
        residual_SBH: torch.Tensor | None,
        probability: float,
        layer: int,
        site: Site,
    ) -> torch.Tensor:
        """residual + dropout(output + bias) between split regions, by the mask that a serial model would draw:
        a rank that has a part of the sequence draws that part of it."""
        if not self.drops(probability):
            return bias_dropout_add(output_SBH, bias, residual_SBH, 0.0, 0)
        seed = self.seed(layer, site, differs=False)
        tokens, parts = output_SBH.shape[0], self.axis.size if self.axis.sequence_parallel else 1
        begin = self.axis.rank * tokens if self.axis.sequence_parallel else 0
        spans = self.context.spans(begin, begin + tokens, parts * tokens)
        lengths = [length for length, _ in spans]
        residuals = (None,) * len(spans) if residual_SBH is None else residual_SBH.split(lengths)
        elements = output_SBH[:1].numel()
        dropped = [
            bias_dropout_add(output, bias, residual, probability, seed, first=first * elements)
            for output, residual, (_, first) in zip(output_SBH.split(lengths), residuals, spans, strict=True)
        ]
        return dropped[0] if len(dropped) == 1 else torch.cat(dropped)

    def dropout(self, hidden_SBH: torch.Tensor, probability: float, layer: int, site: Site) -> torch.Tensor:
        """Dropout alone, as in `bias_dropout_add`."""
        if not self.drops(probability):
            return hidden_SBH
        return self.bias_dropout_add(hidden_SBH, None, None, probability, layer, site)
