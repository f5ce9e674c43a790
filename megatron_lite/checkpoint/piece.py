"""A piece of training state: a rectangle of one named global tensor, as a view of live memory."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of the global tensor `name`, held by this rank.

    `tensor` has the rectangle's shape; saving reads it and loading writes it in place. Of all
    ranks exactly one owns (and writes) each element.
    """

    name: str
    global_shape: tuple[int, ...]
    global_start: tuple[int, ...]
    tensor: torch.Tensor
    owned: bool
