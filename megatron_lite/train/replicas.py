"""What ranks hold alike, compared by checksums: a rank whose memory or arithmetic failed without a word is named."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_lite.errors import ReplicasDiffer
from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.mesh_shape import REPLICAS, ranks_text
from megatron_lite.parallel.process_mesh import ProcessMesh

_CHUNK = 1 << 20
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 4


class Held(NamedTuple):
    """A tensor in a rank's memory."""

    name: str
    tensor: torch.Tensor
    part: str
    """Which part of the whole it is: where name and part are the same, so are the values, on all ranks."""


def compare(
    held: Iterable[Held], shared: Iterable[Held], ends: dist.ProcessGroup | None, mesh: ProcessMesh, step: int
) -> None:
    """Compare what ranks `held` alike along the data, context and tensor axes, and `shared` over `ends`.

    All ranks call. Raises ReplicasDiffer on all of them, with the ranks and tensors that differ.
    """
    known, tied = _Sums(held, mesh.device), _Sums(shared, mesh.device)
    found = [
        difference
        for group, sums in ((mesh.group(*REPLICAS), known), (mesh.group("tensor"), known), (ends, tied))
        if group is not None
        for difference in sums.differences(group)
    ]
    if mesh.sum_numbers([len(found)])[0]:
        distinct = {str(each): each for told in mesh.gather_json(found[:_SHOWN]) for each in told}
        raise ReplicasDiffer(
            f"step {step}: ranks differ in what all of them must hold alike: {_told(distinct.values())}. Memory or "
            "arithmetic failed without a word; this step was not taken, and nothing of it is saved. Leave "
            "that machine out, and go on from a checkpoint that was checked"
        )


class _Sums:
    """The checksums of tensors."""

    def __init__(self, held: Iterable[Held], device: torch.device):
        self._names: list[str] = []
        keys, sums = [], []
        for name, tensor, part in held:
            self._names.append(name)
            keys.append(zlib.crc32(f"{name} {part}".encode()))
            sums.append(checksum(tensor).to(device))
        self._table = torch.stack([torch.tensor(keys, device=device), torch.stack(sums)]) if keys else None

    def differences(self, group: dist.ProcessGroup) -> Iterator[tuple[str, list[list[int]]]]:
        """(name, the ranks of each of its values) of what differs within a group; all its ranks call."""
        if self._table is None:
            return
        ranks = dist.get_process_group_ranks(group)
        told = all_gather(self._table.unsqueeze(0), group)
        if bool((told == told[0]).all()):
            return
        holders: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, (keys, sums) in zip(ranks, told.tolist(), strict=True):
            for place, (key, value) in enumerate(zip(keys, sums, strict=True)):
                holders[place, key][value].append(rank)
        for (place, _), by_value in holders.items():
            if len(by_value) > 1:
                yield self._names[place], sorted(by_value.values(), key=lambda who: (-len(who), who))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits of a tensor's memory, in which every bit and its place count, on its device.

    The sum of all elements, as integers, each times an odd number of its place, modulo 2^64: one bit that flips always
    changes it.
    """
    flat = tensor.detach().contiguous().view(-1)
    flat = flat.view(_SIGNED[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    factors = _odd_numbers(min(_CHUNK, flat.numel()), flat.device)
    for place, chunk in enumerate(flat.split(_CHUNK)):
        total += (chunk.long() * factors[: chunk.numel()]).sum() * (2 * place + 1)
    return total


def _odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    # 2^64 over the golden ratio: neighbours get numbers that have nothing to do with one another.
    return (torch.arange(count, device=device) * -7046029254386353131) | 1


def _told(differences: Iterable[tuple[str, list[list[int]]]]) -> str:
    suspects: dict[str, list[set[int]]] = defaultdict(list)
    for name, (most, *others) in differences:
        strange = {rank for ranks in others for rank in ranks}
        # Where neither is the majority, either may be wrong.
        suspects[name].append(strange if len(most) > len(strange) else strange.union(most))
    names: dict[str, list[str]] = defaultdict(list)
    for name, found in suspects.items():
        names[ranks_text(set.intersection(*found) or set.union(*found))].append(name)
    return "; ".join(
        f"{where} {'differ' if where.startswith('ranks') else 'differs from all others'} in {', '.join(which[:_SHOWN])}"
        for where, which in names.items()
    )
