"""The gradients of ZeRO 1: fp32, flat, added up as backward makes them, reduced once a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_lite.parallel.collectives import my_part, reduce_scatter_in_place
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.reduction import SumAtOwner
from megatron_lite.plan.memory import BUCKETS_UNDER_WAY
from megatron_lite.train.gradient_buckets import GradientBuckets, in_backward_order


class GradientPart(list[torch.Tensor]):
    """The gradients of a parameter group that this replica updates: the tensors of the list, one a
    parameter, are views of `flat_partition`. DeepSpeed's step takes gradients by these names without a copy."""

    def __init__(self, flat_partition: torch.Tensor, sections: Iterable[tuple[int, int]]):
        super().__init__(flat_partition.narrow(0, start, length) for start, length in sections)
        self.flat_partition = flat_partition


class FlatGradients:
    """The fp32 gradients of parameters that are views of flat weights, in buffers of the weights' order.

    What backward makes is added at its place and let go at once, so a rank holds 4 bytes a parameter
    whatever the number of micro-batches, and the step copies nothing. Megatron-LM's distributed
    optimizer keeps gradients so. The number of replicas divides each of `flat_weights`.

    With `bucket_elements` the gradients that come after `expect` are reduced beside backward, in buckets of about so
    many elements: each is summed on the rank that updates it, in an order that makes the same bits. `forward_order`
    has the parameters of all groups.
    """

    def __init__(
        self,
        flat_weights: Sequence[torch.Tensor],
        groups: Sequence[Sequence[torch.nn.Parameter]],
        mesh: ProcessMesh,
        *,
        forward_order: Sequence[torch.nn.Parameter] = (),
        bucket_elements: int | None = None,
    ):
        self._group = mesh.group(*REPLICAS)
        self._buffers: list[torch.Tensor] = []
        self._parts: list[GradientPart] = []
        self._owned: list[torch.Tensor] = []
        self._places: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._filled: set[torch.nn.Parameter] = set()
        self._buckets: GradientBuckets | None = None
        self._stretches: list[tuple[torch.Tensor, int, int]] = []
        for flat, parameters in zip(flat_weights, groups, strict=True):
            buffer = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
            part = my_part(buffer, self._group, 0)
            first, last = part.storage_offset(), part.storage_offset() + part.numel()
            sections: list[tuple[int, int]] = []
            owned: list[tuple[int, int]] = []
            for parameter in parameters:
                start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                self._places[parameter] = buffer.narrow(0, start, parameter.numel()).view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self._take)
                begin, end = max(start, first), min(start + parameter.numel(), last)
                if begin < end:
                    sections.append((begin - first, end - begin))
                    if parameter.mesh_layout.is_owner:
                        # Neighbours in one piece: a norm of a few large tensors is a few kernels.
                        if owned and owned[-1][1] == begin:
                            begin = owned.pop()[0]
                        owned.append((begin, end))
            self._owned += [buffer[begin:end] for begin, end in owned]
            self._buffers.append(buffer)
            self._parts.append(GradientPart(part, sections))
        if bucket_elements is not None and self._group is not None:
            self._buckets = self._cut(groups, forward_order, bucket_elements)

    def _cut(
        self,
        groups: Sequence[Sequence[torch.nn.Parameter]],
        forward_order: Sequence[torch.nn.Parameter],
        elements: int,
    ) -> GradientBuckets:
        """Buckets, each a stretch of a buffer, in the order in which backward completes them."""
        place = {parameter: number for number, parameter in enumerate(forward_order)}
        found: list[tuple[int, list[torch.nn.Parameter], tuple[torch.Tensor, int, int]]] = []
        for buffer, group in zip(self._buffers, groups, strict=True):
            stop = buffer.numel()
            by_offset = sorted(group, key=lambda parameter: self._places[parameter].storage_offset())
            for bucket in in_backward_order(by_offset, elements):
                start = self._places[bucket[-1]].storage_offset()
                found.append((min(place[parameter] for parameter in bucket), bucket, (buffer, start, stop)))
                stop = start
        found.sort(key=lambda bucket: -bucket[0])
        self._stretches = [stretch for _, _, stretch in found]
        return GradientBuckets([bucket for _, bucket, _ in found], self._start, under_way=BUCKETS_UNDER_WAY)

    def expect(self) -> None:
        """The gradients that come from now on are the last before `reduce`."""
        if self._buckets is not None:
            self._buckets.expect()

    def _start(self, number: int) -> list[SumAtOwner]:
        """Send a bucket to the ranks that update it."""
        buffer, start, stop = self._stretches[number]
        length = buffer.numel() // self._group.size()
        owners = range(start // length, -(-stop // length))
        parts = (buffer[max(start, owner * length) : min(stop, (owner + 1) * length)] for owner in owners)
        return [SumAtOwner(part, owner, self._group) for part, owner in zip(parts, owners, strict=True)]

    def take(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add gradients that were written to `.grad` without the parameter's hook being called."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._take(parameter)

    def place_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What has been added up for a parameter since the last `reduce`, fp32."""
        if parameter not in self._filled:
            self._places[parameter].zero_()
            self._filled.add(parameter)
        return self._places[parameter]

    def _take(self, parameter: torch.nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if parameter in self._filled:
            self._places[parameter].add_(gradient)
        else:
            self._places[parameter].copy_(gradient)
            self._filled.add(parameter)
        if self._buckets is not None:
            self._buckets.arrived(parameter)

    def reduce(self) -> list[GradientPart]:
        """The sum over replicas of what came since the last call, this rank's part of each group."""
        for parameter, place in self._places.items():
            if parameter not in self._filled:
                place.zero_()
        self._filled.clear()
        if self._buckets is not None:
            self._buckets.finish()
            return self._parts
        for buffer in self._buffers:
            reduce_scatter_in_place(buffer, self._group)
        return self._parts

    @property
    def owned(self) -> list[torch.Tensor]:
        """The reduced gradients here that no other rank holds, or holds as their owner."""
        return self._owned

    def multiply(self, factor: float) -> None:
        """Scale this rank's reduced gradients."""
        if factor != 1.0:
            for part in self._parts:
                part.flat_partition.mul_(factor)
