"""What a rank sends, counted call by call."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel.mesh_shape import AXES

_PASSES = {
    "allreduce_": 2, "allreduce_coalesced_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1, "alltoall_base_": 1, "alltoall_": 1, "reduce_": 1, "broadcast_": 1,
    "allgather_into_tensor_coalesced_": 1, "reduce_scatter_tensor_coalesced_": 1,
}  # fmt: skip
"""How often a collective takes (r - 1) / r of its whole tensor out of each of r ranks, round a ring."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank's collectives and messages send, while it is entered.

    A collective counts as by the algorithm that sends least, a ring: of a tensor of n bytes that r ranks together sum,
    join or share out, each sends n (r - 1) / r, for an all-reduce twice that. Whoever calls is seen, DeepSpeed too; of
    the calls in backward those of the thread that entered, which is all of them on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        """Bytes by (axes of a mesh's group, as "data" or "pipe+tensor", and "" for any other; torch's operator)."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._count(function.__name__.partition(".")[0], arguments)
        return function(*arguments, **(options or {}))

    def _count(self, name: str, arguments: tuple) -> None:
        groups = [dist.ProcessGroup.unbox(a) for a in arguments if _is_group(a)]
        if not groups or name in ("recv_", "recv_any_source_", "barrier", "monitored_barrier_"):
            return
        ranks = groups[0].size()
        whole = max(_bytes(argument) for argument in arguments)
        axes = "+".join(axis for axis in AXES if axis in groups[0].group_desc)
        self.sent[axes, name] += whole if name == "send" else Fraction(_PASSES[name] * whole * (ranks - 1), ranks)

    def by_axes(self) -> dict[str, Fraction]:
        """Bytes by the axes of the group."""
        total: Counter[str] = Counter()
        for (axes, _), sent in self.sent.items():
            total[axes] += sent
        return {axes: Fraction(sent) for axes, sent in total.items() if sent}


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0
