"""The schedule of a pipeline, run on this rank: torch.distributed.pipelining around the stages held here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.stage import _RecvInfo

from megatron_lite.parallel.pipeline.rules import PipelinePlan
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.whereabouts import HERE

TakeGradients = Callable[[Iterable[nn.Parameter]], None]
"""Told of parameters whose `.grad` was written without a hook of theirs being called."""


class Pipeline:
    """The stages of this rank and their schedule.

    `modules` are the stages held here by number; the first stage takes a batch [B, S] of token ids, the last gives a
    scalar loss, and between stages go tensors of `hidden_shape` in `dtype`.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        plan: PipelinePlan,
        mesh: ProcessMesh,
        *,
        batch_shape: tuple[int, int],
        hidden_shape: tuple[int, ...],
        dtype: torch.dtype,
    ):
        self._modules = dict(modules)
        self._plan = plan
        self._mesh = mesh
        self._tokens = torch.empty(batch_shape, dtype=torch.int64, device="meta")
        self._hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
        self._loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        self._take_gradients: TakeGradients | None = None
        self._share: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._schedule: torch_schedules._PipelineSchedule | None = None
        self._micro_batches = 0

    @property
    def modules(self) -> list[nn.Module]:
        """The stages held here, which the schedule calls."""
        return list(self._modules.values())

    @property
    def has_first(self) -> bool:
        return 0 in self._modules

    @property
    def has_last(self) -> bool:
        return self._plan.stages - 1 in self._modules

    def run(
        self,
        tokens: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        loss_masks: Sequence[torch.Tensor],
        seeds: Sequence[int] | None,
        *,
        told: Mapping[str, Sequence[torch.Tensor]],
        share: Callable[[torch.Tensor], torch.Tensor],
        take_gradients: TakeGradients | None,
    ) -> None:
        """Forward and backward of all micro-batches of a step.

        What backward begins from is `share(loss)` of each micro-batch's loss, asked for on the last stage's rank.
        Each stage adds its gradients to `.grad`; `take_gradients` may take them away. Every stage is `told`, by name,
        something [B, ...] of each micro-batch.
        """
        self._share, self._take_gradients = share, take_gradients
        if self._micro_batches != len(tokens):
            self._schedule, self._micro_batches = self._make_schedule(len(tokens)), len(tokens)
        inputs: tuple[torch.Tensor, ...] = ()
        options = {name: torch.cat(list(tensors)) for name, tensors in told.items()}
        target = None
        if self.has_first:
            inputs = (torch.cat(list(tokens)),)
        if self.has_last:
            options |= {"labels": torch.cat(list(labels)), "loss_mask": torch.cat(list(loss_masks))}
            target = options["labels"]
        if seeds is not None:
            # The same 64 bits as a signed number, which is what tensors hold.
            signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
            options["dropout_seed"] = torch.tensor(signed, dtype=torch.int64)
        self._schedule.step(*inputs, target=target, return_outputs=False, **options)

    def _make_schedule(self, micro_batches: int) -> torch_schedules._PipelineSchedule:
        plan = self._plan
        stages = [
            _Stage(
                module,
                index,
                plan.stages,
                self._mesh.device,
                input_args=self._tokens if index == 0 else self._hidden,
                output_args=self._loss if index == plan.stages - 1 else self._hidden,
                group=self._mesh.group("pipe"),
            )
            for index, module in sorted(self._modules.items())
        ]
        for stage in stages:
            stage.take_gradients = self._took
            stage.suppliers = {"F": self._rank_of(stage.stage_index - 1), "B": self._rank_of(stage.stage_index + 1)}
        options = {"n_microbatches": micro_batches, "loss_fn": self._loss_of, "scale_grads": False}
        if plan.csv is not None:
            schedule = torch_schedules._PipelineScheduleRuntime(stages, **options)
            schedule._load_csv(plan.csv)
            return schedule
        kind = torch_schedules.get_schedule_class(plan.schedule.name)
        if not plan.schedule.takes_many_stages:
            return kind(stages[0], **options)
        schedule = kind(stages, **options)
        _take_pairs_apart(schedule)
        return schedule

    def _rank_of(self, stage: int) -> int | None:
        """The rank, of all, that holds a stage; None for this one, and where there is no such stage."""
        if stage in self._modules or not 0 <= stage < self._plan.stages:
            return None
        return dist.get_global_rank(self._mesh.group("pipe"), self._plan.placement[stage])

    def _loss_of(self, loss: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return self._share(loss)

    def _took(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._take_gradients is not None:
            self._take_gradients(parameters)


def _take_pairs_apart(schedule: torch_schedules._PipelineScheduleRuntime) -> None:
    """Make two actions of each forward and backward that torch pairs, to be overlapped.

    It runs them one after the other, and sends what the first has made after the second: half of DualPipeV's bubble.
    """
    orders = {
        rank: [part for action in order for part in (getattr(action, "sub_actions", None) or (action,))]
        for rank, order in schedule.pipeline_order.items()
    }
    if orders != schedule.pipeline_order:
        schedule.pipeline_order = orders
        schedule._prepare_schedule_with_comms(orders)


class _Stage(PipelineStage):
    """A stage as torch has it, but for three things.

    It notes where it is, for who asks what a rank waits for. It tells of the gradients of weights that torch writes to
    `.grad` by itself. And what it receives has memory from the order to receive it until it is used, not one buffer for
    each micro-batch of a step for good, nor until all losses are there.
    """

    take_gradients: TakeGradients
    suppliers: dict[str, int | None]
    """The ranks, if others, that make the inputs of its forward and of its backward passes."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._await("F", fwd_chunk_id)
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._await("B", bwd_chunk_id)
        if not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments, **options):
        with self._doing("F", fwd_chunk_id):
            output = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        _drop_buffers(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments, **options) -> None:
        with self._doing("B", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        _drop_buffers(self.grad_recv_info[bwd_chunk_id])
        if (loss := options.get("loss")) is not None:
            # The schedule keeps every loss until the step is over, and its graph would keep the stage's input.
            loss.detach_()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _drop_buffers(infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _drop_buffers(infos)

    def _make_buffers(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._doing("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.take_gradients(self.submod.parameters())

    def _await(self, kind: str, micro_batch: int) -> None:
        if (rank := self.suppliers[kind]) is not None:
            HERE.order(rank, *self._wanted(kind, micro_batch))

    def _wanted(self, kind: str, micro_batch: int) -> tuple[str | int, ...]:
        return "the input" if kind == "F" else "the gradient", "of stage", self.stage_index, "micro-batch", micro_batch

    @contextlib.contextmanager
    def _doing(self, kind: str, micro_batch: int) -> Iterator[None]:
        """Note a pass under way: within it nothing is waited for, and after it what had been ordered before."""
        where = "of stage", self.stage_index, "micro-batch", micro_batch
        HERE.awaited.pop(self._wanted(kind, micro_batch), None)
        awaited, HERE.awaited = HERE.awaited, {}
        HERE.note(_ACTIONS[kind], *where)
        with HERE.computing(self.device):
            yield
        HERE.awaited = awaited
        HERE.note("after", _ACTIONS[kind], *where)


_ACTIONS = {"F": "the forward pass", "B": "the backward pass", "W": "the gradients of weights"}


def _drop_buffers(infos: Sequence[_RecvInfo]) -> None:
    for info in infos:
        info.buffer = None
