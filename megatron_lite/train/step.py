"""A single training step, and a validation pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.micro_batch import MicroBatch
from megatron_lite.errors import NonFiniteError
from megatron_lite.monitor.health import Hurt, describe, first_hurt
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.random import micro_batch_seed
from megatron_lite.parallel.whereabouts import HERE, VALIDATION
from megatron_lite.train.engine_interface import Engine, StepOutcome
from megatron_lite.train.reading import no_target, read

if TYPE_CHECKING:
    from megatron_lite.parallel.pipeline.runner import Pipeline


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a training step leaves behind."""

    loss: float
    """Mean loss over the target tokens of the global batch, in nats."""
    outcome: StepOutcome


def train_step(
    engine: Engine,
    mesh: ProcessMesh,
    micro_batches: Sequence[MicroBatch],
    *,
    target_tokens: int,
    step: int,
    seed: int | None,
    learning_rate: float,
    pipeline: Pipeline | None = None,
    look: Callable[[Engine], None] | None = None,
    before_change: Callable[[], None] | None = None,
) -> StepResult:
    """One optimizer step on this rank's micro-batches of a global batch.

    `target_tokens` are those of the whole global batch, counted before backward: masks, accumulation
    and data ranks cannot bias the mean. `seed` None is no dropout. `look` is shown the engine while it
    holds this step's gradients; `before_change` returns when weights and optimizer state may change.
    Raises NonFiniteError, on all ranks alike and before any weight changes, for a NaN or infinite loss.
    """
    # ------------------------------------------------------------------ single training step
    loss = torch.zeros((), dtype=torch.float32, device=mesh.device)

    def share(loss_sum: torch.Tensor) -> torch.Tensor:
        part = loss_sum / target_tokens
        loss.add_(part.detach())
        return part

    if pipeline is None:
        with engine.gradients(len(micro_batches)) as backward:
            for number, micro_batch in enumerate(micro_batches, 1):
                HERE.note("micro-batch", number, "of", len(micro_batches))
                with HERE.computing(mesh.device):
                    backward(share(forward(engine, mesh, micro_batch, step=step, seed=seed)))
    else:
        with engine.scheduled_gradients() as scheduled:
            pipeline.run(
                *on_device(micro_batches, mesh),
                None if seed is None else [micro_batch_seed(seed, step, batch.index) for batch in micro_batches],
                told=told_of(micro_batches, mesh),
                share=lambda loss_sum: scheduled.scaled(share(loss_sum)),
                take_gradients=scheduled.take_gradients,
            )
    HERE.note("the sum of the loss")
    value = _sum_over_ranks(loss, mesh)
    if not math.isfinite(value):
        raise_non_finite(engine, mesh, step, value, share=loss.item())
    if look is not None:
        look(engine)
    if before_change is not None:
        before_change()
    HERE.note("the optimizer's step")
    outcome = engine.step(learning_rate)
    # ---------------------------------------------------------------------------------------
    if not math.isfinite(outcome.grad_norm) and not (outcome.skipped and engine.scales_loss):
        raise_non_finite(engine, mesh, step, outcome.grad_norm, what="gradient norm")
    return StepResult(value, outcome)


def forward(engine: Engine, mesh: ProcessMesh, batch: MicroBatch, *, step: int, seed: int | None) -> torch.Tensor:
    """Sum of the token losses of one micro-batch, fp32 scalar."""
    dropout_seed = None if seed is None else micro_batch_seed(seed, step, batch.index)
    tokens, labels, loss_masks = on_device([batch], mesh)
    told = {name: tensor for name, (tensor,) in told_of([batch], mesh).items()}
    return engine.forward(tokens[0], labels[0], loss_masks[0], **told, dropout_seed=dropout_seed)


def on_device(batches: Sequence[MicroBatch], mesh: ProcessMesh) -> tuple[list[torch.Tensor], ...]:
    """(tokens, labels, loss masks) of micro-batches on this rank's device."""
    columns = zip(*((batch.tokens, batch.labels, batch.loss_mask) for batch in batches), strict=True)
    return tuple([tensor.to(mesh.device, non_blocking=True) for tensor in column] for column in columns)


def told_of(batches: Sequence[MicroBatch], mesh: ProcessMesh) -> dict[str, list[torch.Tensor]]:
    """What micro-batches say of the documents in them, as the model's `forward` takes it; empty if they say nothing."""
    told = {}
    if batches[0].begins is not None:
        # The host lays attention out by them.
        told["begins_BS"] = [batch.begins for batch in batches]
    if batches[0].positions is not None:
        told["positions_BS"] = [batch.positions.to(mesh.device, non_blocking=True) for batch in batches]
    return told


@torch.no_grad()
def validate(
    engine: Engine, mesh: ProcessMesh, loader: BatchLoader, batches: int, batch_size: int, asked: Callable[[], bool]
) -> float | None:
    """Mean loss in nats over the first `batches` global batches of a stream, dropout off.

    None, on all ranks alike, if one of them is `asked` to stop meanwhile: a launcher that waits for the
    state to be saved does not wait for a validation. Raises DataError if no token of them is a target.
    """
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in range(batches):
        HERE.begin(VALIDATION, batch + 1)
        micro_batches, (stops,) = read(loader, mesh, batch * batch_size, batch_size, lambda _: [asked()])
        if stops:
            engine.module.train()
            return None
        for micro_batch in micro_batches:
            total[0] += forward(engine, mesh, micro_batch, step=0, seed=None)
            total[1] += micro_batch.loss_mask.sum()
    # Each rank of a pipeline and of a shared sequence has counted all tokens, and has a part of the loss.
    total[1] /= mesh.size("pipe", "context")
    _all_reduce_over_ranks(total, mesh)
    engine.module.train()
    if not total[1]:
        raise no_target(f"validation, samples 0 to {batches * batch_size - 1:,}", "or validate on more batches")
    return (total[0] / total[1]).item()


def _sum_over_ranks(value: torch.Tensor, mesh: ProcessMesh) -> float:
    """The sum of `value` over data, context and pipe ranks."""
    total = value.clone()
    _all_reduce_over_ranks(total, mesh)
    return total.item()


def _all_reduce_over_ranks(total: torch.Tensor, mesh: ProcessMesh) -> None:
    for axis in (*REPLICAS, "pipe"):
        if (group := mesh.group(axis)) is not None:
            dist.all_reduce(total, group=group)


def raise_non_finite(
    engine: Engine, mesh: ProcessMesh, step: int, value: float, *, share: float | None = None, what: str = "loss"
) -> NoReturn:
    """Say on every rank alike which rank and parameter a non-finite value comes from.

    Called on all ranks together: all look through weights and gradients, which is collective. `share` is
    what this rank added to `value`.
    """
    rank = mesh.global_rank
    weight = first_hurt(engine.named_weights(), rank, is_gradient=False)
    gradient = first_hurt(engine.named_gradients(), rank, is_gradient=True)
    told = mesh.gather_json([share is not None and not math.isfinite(share), weight or gradient])
    raise NonFiniteError(
        describe(
            value,
            step=step,
            what=what,
            ranks=[there for there, (is_odd, _) in enumerate(told) if is_odd],
            hurt=min((Hurt(*found) for _, found in told if found), default=None),
            data_size=mesh.size(*REPLICAS),
            holds_gradients=engine.holds_gradients,
        )
    )
