"""The mesh as arithmetic: which rank sits where, and which ranks form a group. No torch.

Axes, slowest first: pipe, data, context, expert, tensor. Tensor ranks are adjacent, so that the
axis that talks most stays inside a node.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

from megatron_lite.errors import ConfigError

AXES = ("pipe", "data", "context", "expert", "tensor")
REPLICAS = ("data", "context")
"""The axes whose ranks have the same weights and different tokens: gradients are summed and ZeRO shards over them."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the five axes. The world size is their product."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ConfigError(f"the {axis} axis has size {self.size(axis)}; every axis has at least 1 rank")

    @staticmethod
    def of_world(world_size: int, *, tensor: int = 1, pipe: int = 1, context: int = 1, expert: int = 1) -> MeshShape:
        """The shape whose data size is what remains of `world_size`.

        Raises ConfigError when the other axes do not divide it.
        """
        model = tensor * pipe * context * expert
        if model < 1 or world_size % model:
            lower = max(world_size // model * model, model) if model >= 1 else 1
            raise ConfigError(
                f"world size {world_size} is not a multiple of tensor x pipe x context x expert = "
                f"{tensor} x {pipe} x {context} x {expert} = {model}; start {lower} or "
                f"{lower + model} ranks, or change the sizes"
            )
        return MeshShape(pipe, world_size // model, context, expert, tensor)

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.context * self.expert * self.tensor

    def size(self, *axes: str) -> int:
        """Number of ranks along `axes` together."""
        product = 1
        for axis in axes:
            product *= getattr(self, axis)
        return product

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` sits on each axis."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        return {axis: rank // stride % getattr(self, axis) for axis, stride in self._strides.items()}

    def rank(self, **coordinates: int) -> int:
        """The rank at `coordinates`; axes not named are at 0."""
        return sum(place * self._strides[axis] for axis, place in coordinates.items())

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """All groups of ranks that differ along `axes` alone, each in mesh order, by first rank."""
        others = [axis for axis in AXES if axis not in axes]
        inner = self._offsets([axis for axis in AXES if axis in axes])
        for base in self._offsets(others):
            yield [base + offset for offset in inner]

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The ranks that differ from `rank` along `axes` alone, in mesh order."""
        where = self.coordinates(rank)
        base = rank - self.rank(**{axis: where[axis] for axis in axes})
        return [base + offset for offset in self._offsets([axis for axis in AXES if axis in axes])]

    def _offsets(self, axes: list[str]) -> list[int]:
        offsets = [0]
        for axis in axes:
            steps = [self._strides[axis] * i for i in range(self.size(axis))]
            offsets = [offset + step for offset in offsets for step in steps]
        return offsets

    @functools.cached_property
    def _strides(self) -> dict[str, int]:
        """How far apart neighbours along each axis are."""
        return {axis: self.size(*AXES[i + 1 :]) for i, axis in enumerate(AXES)}

    def __str__(self) -> str:
        short = {"tensor": "tp", "pipe": "pp", "context": "cp", "data": "dp", "expert": "ep"}
        return ",".join(f"{name}={self.size(axis)}" for axis, name in short.items() if self.size(axis) > 1) or "tp=1"


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-5, 7 and 9": any number of them in few words."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [text for run in runs for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    if len(texts) == 1:
        return f"rank{'s' if '-' in texts[0] else ''} {texts[0]}"
    return f"ranks {', '.join(texts[:-1])} and {texts[-1]}"
