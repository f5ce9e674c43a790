"""The mesh as live process groups, seen from one rank.

A `ProcessMesh` is passed to whatever talks; there is no global group. On an axis of size 1 the
group is None and a collective returns its input, so one process needs no process group at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.parallel.mesh_shape import AXES, MeshShape


class ProcessMesh:
    """This rank's place on the mesh and its groups along each axis.

    `rank` and `shape` alone make a mesh without groups, enough to lay a model out (dry runs,
    meta device); `ProcessMesh.create` makes the groups, a collective call over all ranks.
    """

    def __init__(self, shape: MeshShape, rank: int, device: torch.device | str = "cpu"):
        self.shape = shape
        self.global_rank = rank
        self.device = torch.device(device)
        self._where = shape.coordinates(rank)
        self._groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {}
        self._control: dist.ProcessGroup | None = None

    @staticmethod
    def create(shape: MeshShape, device: torch.device | str = "cpu", timeout: timedelta | None = None) -> ProcessMesh:
        """The mesh of a started process group (or of one process), its groups made."""
        started = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if started else 1
        if world != shape.world_size:
            raise ValueError(f"{world} ranks were started for a mesh of {shape.world_size}")
        mesh = ProcessMesh(shape, dist.get_rank() if started else 0, device)
        for axes in (("tensor",), ("data",), ("pipe",), ("context",), ("expert",), ("pipe", "tensor")):
            mesh._groups[axes] = mesh._make_group(axes, timeout)
        if world > 1:
            # JSON between ranks goes over gloo, so that it needs no GPU and no GPU stream.
            mesh._control = dist.new_group(backend="gloo", timeout=timeout or timedelta(minutes=10))
        return mesh

    def _make_group(self, axes: tuple[str, ...], timeout: timedelta | None) -> dist.ProcessGroup | None:
        if self.shape.size(*axes) == 1:
            return None
        mine = None
        for ranks in self.shape.groups(*axes):
            group = dist.new_group(ranks, timeout=timeout)
            if self.global_rank in ranks:
                mine = group
        return mine

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    def size(self, *axes: str) -> int:
        return self.shape.size(*axes)

    def rank(self, axis: str) -> int:
        """This rank's place along `axis`."""
        return self._where[axis]

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
            mine = None
            if length > 1:
                for ranks in self.shape.groups(axis):
                    for first in range(0, len(ranks), length):
                        group = dist.new_group(ranks[first : first + length])
                        if self.global_rank in ranks[first : first + length]:
                            mine = group
            self._groups[key] = mine
        return self._groups[key]

    def gather_json(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. JSON, never pickled objects."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([payload.numel()]), group=self._control)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self._control)
        return [json.loads(bytes(part[: int(length)].numpy())) for part, length in zip(gathered, lengths, strict=True)]

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """`values` summed over all ranks, in float64: exact for counts below 2^53."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self._control)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self._control)
