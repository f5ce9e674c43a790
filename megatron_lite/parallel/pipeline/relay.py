"""Hidden states passed from stage to stage where nothing is differentiated: validation, evaluation, generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.whereabouts import HERE


class Relay:
    """The way of hidden states along the pipe axis, of which `placement` says the rank of each stage.

    One batch is on its way through this rank at a time; batches follow one another, so that ranks work at once.
    """

    def __init__(self, mesh: ProcessMesh, placement: Sequence[int]):
        self._mesh = mesh
        self._placement = tuple(placement)
        self._kept: torch.Tensor | None = None
        self._sending: dist.Work | None = None

    def receive(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the stage before `stage` sent."""
        if self._is_here(stage - 1):
            kept, self._kept = self._kept, None
            return kept
        received = torch.empty(shape, dtype=dtype, device=self._mesh.device)
        group, source = self._mesh.group("pipe"), self._placement[stage - 1]
        with HERE.waiting("the hidden states of the stage before", dist.get_global_rank(group, source)):
            dist.recv(received, group=group, group_src=source)
        return received

    def send(self, stage: int, hidden: torch.Tensor) -> None:
        """Give what `stage` made to the next one."""
        # Kept for the next stage here, or until it has been sent.
        hidden = hidden.detach().contiguous()
        self._kept = hidden
        if self._is_here(stage + 1):
            return
        if self._sending is not None:
            self._sending.wait()
        self._sending = dist.isend(hidden, group=self._mesh.group("pipe"), group_dst=self._placement[stage + 1])

    def tell(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` of the last stage's rank, on all pipe ranks."""
        if (group := self._mesh.group("pipe")) is None:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=group, group_src=self._placement[-1])
        return tensor

    def _is_here(self, stage: int) -> bool:
        return self._placement[stage] == self._mesh.rank("pipe")
