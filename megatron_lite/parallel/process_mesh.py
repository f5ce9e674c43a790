"""The mesh as live process groups, seen from one rank.

A `ProcessMesh` is passed to whatever talks; there is no global group. On an axis of size 1 the
group is None and a collective returns its input, so one process needs no process group at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.parallel.mesh_shape import AXES, REPLICAS, MeshShape

NCCL_GRACE = timedelta(minutes=2)
"""How much longer nccl waits than it is told to: it ends the process then, which is to say before why it does."""


def group_timeout(device: torch.device, longest: timedelta) -> timedelta:
    """The timeout of groups whose collectives may take so long: gloo's raise an error, nccl's end the process."""
    return longest + NCCL_GRACE if device.type == "cuda" else longest


class ProcessMesh:
    """This rank's place on the mesh and its groups along each axis.

    `rank` and `shape` alone make a mesh without groups, enough to lay a model out (dry runs,
    meta device); `ProcessMesh.create` makes the groups, a collective call over all ranks.
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int,
        device: torch.device | str = "cpu",
        timeout: timedelta = timedelta(minutes=10),
    ):
        self.shape = shape
        self.global_rank = rank
        self.device = torch.device(device)
        self._where = shape.coordinates(rank)
        self._timeout = timeout
        self._groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {}
        self._control = Exchange(rank, shape.world_size, None)

    @staticmethod
    def create(
        shape: MeshShape, device: torch.device | str = "cpu", timeout: timedelta = timedelta(minutes=10)
    ) -> ProcessMesh:
        """The mesh of a started process group (or of one process), its groups made.

        `timeout` is the longest a collective of any of them may take, by the word of whoever watches on a GPU.
        """
        started = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if started else 1
        if world != shape.world_size:
            raise ValueError(f"{world} ranks were started for a mesh of {shape.world_size}")
        mesh = ProcessMesh(shape, dist.get_rank() if started else 0, device, timeout)
        for axes in (("tensor",), ("data",), ("pipe",), ("context",), ("expert",), REPLICAS, ("pipe", "tensor")):
            if all(shape.size(axis) > 1 for axis in axes):
                mesh._groups[axes] = mesh.make_group(shape.groups(*axes), "+".join(axes))
        mesh._control = mesh.make_exchange()
        return mesh

    def make_exchange(self) -> Exchange:
        """A way of its own for numbers and JSON between all ranks, for another thread; a collective call."""
        # Over gloo, so that it needs no GPU and no GPU stream.
        group = dist.new_group(backend="gloo", timeout=self._timeout, group_desc="all") if self.world_size > 1 else None
        return Exchange(self.global_rank, self.world_size, group)

    def make_group(self, groups: Iterable[Sequence[int]], over: str) -> dist.ProcessGroup:
        """A new process group for each of these lists of ranks, of which this rank's is returned.

        A collective call over all ranks; the lists hold each rank once. `over` says what their ranks differ along:
        axes joined by "+", or another word. torch does not hand the timeout of the first group on, so no group is
        made elsewhere.
        """
        timeout = group_timeout(self.device, self._timeout)
        made = [(ranks, dist.new_group(ranks, timeout=timeout, group_desc=over)) for ranks in groups]
        return next(group for ranks, group in made if self.global_rank in ranks)

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    def size(self, *axes: str) -> int:
        return self.shape.size(*axes)

    def rank(self, *axes: str) -> int:
        """This rank's place along `axes` together, in mesh order."""
        place = 0
        for axis in AXES:
            if axis in axes:
                place = place * self.size(axis) + self._where[axis]
        return place

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The group of this rank along `axes`; None where it would be this rank alone."""
        axes = tuple(axis for axis in AXES if axis in axes and self.size(axis) > 1) or axes[:1]
        if self.size(*axes) == 1:
            return None
        return self._groups[axes]

    def subgroup(self, axis: str, length: int) -> dist.ProcessGroup | None:
        """The group of `length` neighbours along `axis` this rank is in; a collective call over all ranks.

        None where it would be this rank alone, and on a mesh without groups.
        """
        if not self._groups:
            return None
        key = (axis, str(length))
        if key not in self._groups:
            neighbours = (
                ranks[first : first + length]
                for ranks in self.shape.groups(axis)
                for first in range(0, len(ranks), length)
            )
            self._groups[key] = self.make_group(neighbours, f"{length} along {axis}") if length > 1 else None
        return self._groups[key]

    def ends(self, axis: str, first: int, last: int) -> dist.ProcessGroup | None:
        """The group of places `first` and `last` along `axis`; a collective call over all ranks.

        None on ranks in between, where both are one place, and on a mesh without groups.
        """
        if not self._groups or first == last:
            return None
        key = (axis, f"{first} and {last}")
        if key not in self._groups:
            groups = []
            for ranks in self.shape.groups(axis):
                pair = [ranks[first], ranks[last]]
                groups += [pair, *([rank] for rank in ranks if rank not in pair)]
            self._groups[key] = self.make_group(groups, f"the ends of {axis}")
        return self._groups[key] if self.rank(axis) in (first, last) else None

    def gather_json(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. JSON, never pickled objects."""
        return self._control.gather_json(value)

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """`values` summed over all ranks, in float64: exact for counts below 2^53."""
        return self._control.sum_numbers(values)

    def barrier(self) -> None:
        """Wait for every rank."""
        self._control.barrier()


class Exchange:
    """Numbers and JSON between all ranks over a group of its own; one thread at a time may use it."""

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None):
        self.global_rank = rank
        self.world_size = world_size
        self._group = group

    def gather_json(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([payload.numel()]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [json.loads(bytes(part[: int(length)].numpy())) for part, length in zip(gathered, lengths, strict=True)]

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """`values` summed over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self._group)
