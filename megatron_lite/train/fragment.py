"""Where an engine keeps the master of a part of a parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from megatron_lite.parallel.layout import Fragment, ParameterLayout


@dataclasses.dataclass(frozen=True)
class MasterFragment:
    """Elements [start, start + length) of a parameter's flattened local tensor, and where this rank
    keeps their fp32 master: from `offset` on in the flat tensor `master`."""

    parameter: torch.nn.Parameter
    name: str
    layout: ParameterLayout
    start: int
    length: int
    master: torch.Tensor
    offset: int

    def parts(self) -> Iterator[tuple[Fragment, int, int]]:
        """Rectangles of the global tensor, each with its first and last element (exclusive) in `master`."""
        for part in self.layout.fragments(self.start, self.start + self.length):
            first = self.offset + part.flat_start - self.start
            yield part, first, first + math.prod(part.shape)
