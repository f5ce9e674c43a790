"""The engine without DeepSpeed: every replica holds all state in fp32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_lite.optim.gradient_norm import clip_factor
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.memory import REPLICA_BUCKET_BYTES
from megatron_lite.train.backward import Backward, ScheduledBackward, SharedWeight
from megatron_lite.train.engine_interface import Engine, StepOutcome
from megatron_lite.train.fragment import MasterFragment

from megatron_lite.train.replicas import Held

class ReplicaEngine(Engine):
    """ZeRO 0 in fp32: every replica holds all state; gradients are summed in one pass at the step."""

    def __init__(self, module, mesh: ProcessMesh, optimizer, slots, clip_grad, shared: SharedWeight | None = None):
        super().__init__(module, mesh, optimizer, slots, shared)
        self._clip_grad = clip_grad
        self._allocate_state((p, group) for group in optimizer.param_groups for p in group["params"])

    @contextlib.contextmanager
    def gradients(self, count: int) -> Iterator[Backward]:
        self._optimizer.zero_grad(set_to_none=True)
        self.holds_gradients = True
        yield lambda loss: loss.backward()
        self._sum_over_replicas()

    @contextlib.contextmanager
    def scheduled_gradients(self) -> Iterator[ScheduledBackward]:
        with self.gradients(0):
            yield ScheduledBackward(lambda share: share)
            if self._shared is not None:
                self._shared.join(self._shared.parameter.grad)

    def _sum_over_replicas(self, bucket_bytes: int = REPLICA_BUCKET_BYTES) -> None:
        group = self.mesh.group(*REPLICAS)
        if group is None:
            return
        bucket: list[torch.Tensor] = []
        filled = 0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        for position, gradient in enumerate(gradients):
            bucket.append(gradient)
            filled += gradient.numel() * gradient.element_size()
            if filled >= bucket_bytes or position == len(gradients) - 1:
                flat = torch.cat([g.reshape(-1) for g in bucket])
                dist.all_reduce(flat, group=group)
                for g, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(total.view_as(g))
                bucket, filled = [], 0

    def step(self, learning_rate: float) -> StepOutcome:
        held = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = self._global_norm([p.grad for p in held if p.mesh_layout.is_owner], ("pipe", "tensor"))
        if not math.isfinite(norm):
            return StepOutcome(norm, skipped=True, loss_scale=1.0)
        if (factor := clip_factor(norm, self._clip_grad)) != 1.0:
            torch._foreach_mul_([parameter.grad for parameter in held], factor)
        self._set_learning_rate(learning_rate)
        self._optimizer.step()
        self.holds_gradients = False
        return StepOutcome(norm, skipped=False, loss_scale=1.0)

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.module.named_parameters():
            if self.holds_gradients and parameter.grad is not None:
                yield name, parameter.grad

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def _fragments(self) -> Iterator[MasterFragment]:
        for name, parameter in self.module.named_parameters():
            yield MasterFragment(parameter, name, parameter.mesh_layout, 0, parameter.numel(), parameter, 0)

    def _owns_replica(self) -> bool:
        return self.mesh.rank(*REPLICAS) == 0
    def held(self) -> Iterator[Held]:
        yield from super().held()
        for name, parameter in self.module.named_parameters():
            for slot, values in self._optimizer.state[parameter].items():
                yield Held(f"{slot} of {name}", values, str(parameter.mesh_layout.boxes))

