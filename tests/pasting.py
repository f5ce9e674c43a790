"""The opposite of `ParameterLayout.cut`, for tests that put a global tensor together."""

from __future__ import annotations

import torch

from megatron_lite.parallel.layout import ParameterLayout


def paste(layout: ParameterLayout, local: torch.Tensor, into: torch.Tensor) -> None:
    """Write a rank's boxes of `local` to their places in the global tensor `into`."""
    for box in layout.boxes:
        there = tuple(slice(first, first + length) for first, length in zip(box.global_start, box.shape, strict=True))
        here = tuple(slice(first, first + length) for first, length in zip(box.local_start, box.shape, strict=True))
        into[there] = local[here]
