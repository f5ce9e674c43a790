"""The engine without DeepSpeed: every replica holds all state in fp32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_lite.optim.gradient_norm import clip_factor
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.memory import BUCKETS_UNDER_WAY
from megatron_lite.train.backward import Backward, ScheduledBackward, SharedWeight
from megatron_lite.train.engine_interface import Engine, StepOutcome
from megatron_lite.train.fragment import MasterFragment
from megatron_lite.train.gradient_buckets import GradientBuckets, in_backward_order
from megatron_lite.train.replicas import Held


class ReplicaEngine(Engine):
    """ZeRO 0 in fp32: every replica holds all state; gradients are summed once a step.

    With `overlaps` a bucket of gradients is summed while the last micro-batch's backward makes the next.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        mesh: ProcessMesh,
        optimizer: torch.optim.Optimizer,
        slots: Iterable[str],
        clip_grad: float,
        shared: SharedWeight | None = None,
        *,
        overlaps: bool = False,
        bucket_elements: int,
    ):
        super().__init__(module, mesh, optimizer, slots, shared)
        self._clip_grad = clip_grad
        self._allocate_state((p, group) for group in optimizer.param_groups for p in group["params"])
        self._group = mesh.group(*REPLICAS)
        self._overlaps = overlaps and self._group is not None
        self._parameters = in_backward_order(module.parameters(), bucket_elements)
        under_way = BUCKETS_UNDER_WAY if self._overlaps else 0
        self._buckets = GradientBuckets(self._parameters, self._sum_over_replicas, under_way=under_way)
        if self._overlaps:
            for parameter in module.parameters():
                parameter.register_post_accumulate_grad_hook(self._buckets.arrived)

    @contextlib.contextmanager
    def gradients(self, count: int) -> Iterator[Backward]:
        self.module.zero_grad(set_to_none=True)
        self.holds_gradients = True
        done = 0

        def backward(loss: torch.Tensor) -> None:
            nonlocal done
            done += 1
            if self._overlaps and done == count:
                self._buckets.expect()
            loss.backward()

        yield backward
        if self._group is not None:
            self._buckets.finish()

    @contextlib.contextmanager
    def scheduled_gradients(self) -> Iterator[ScheduledBackward]:
        with self.gradients(0):
            yield ScheduledBackward(lambda share: share)
            if self._shared is not None:
                self._shared.join(self._shared.parameter.grad)

    def _sum_over_replicas(self, bucket: int) -> list[_FlatSum]:
        gradients = [p.grad for p in self._parameters[bucket] if p.grad is not None]
        return [_FlatSum(gradients, self._group)] if gradients else []

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

    def held(self) -> Iterator[Held]:
        yield from super().held()
        for name, parameter in self.module.named_parameters():
            for slot, values in self._optimizer.state[parameter].items():
                yield Held(f"{slot} of {name}", values, str(parameter.mesh_layout.boxes))

    def _owns_replica(self) -> bool:
        return self.mesh.rank(*REPLICAS) == 0


class _FlatSum:
    """The sum of gradients over a group, on its way."""

    def __init__(self, gradients: Sequence[torch.Tensor], group: dist.ProcessGroup):
        self._gradients = gradients
        self._flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> None:
        """Until the gradients are that sum."""
        self._work.wait()
        for gradient, total in zip(
            self._gradients, self._flat.split([g.numel() for g in self._gradients]), strict=True
        ):
            gradient.copy_(total.view_as(gradient))
