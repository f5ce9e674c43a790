"""The loop: train a step, and once in a while evaluate, save, log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_lite import log
from megatron_lite.config.run import RunConfig
from megatron_lite.data.length_curriculum import LengthCurriculum
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.micro_batch import MicroBatch
from megatron_lite.data.stream import SampleStream, parse_skip_ranges, stream_position
from megatron_lite.monitor.data_wait import DataWait
from megatron_lite.monitor.histograms import histograms
from megatron_lite.monitor.memory import MemoryMeter
from megatron_lite.monitor.metrics import Metrics, throughput
from megatron_lite.monitor.pace import Pace
from megatron_lite.monitor.sinks import Sinks
from megatron_lite.optim.schedule import Schedule
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.whereabouts import CHECKPOINT, HERE, STEP
from megatron_lite.plan.memory import Moment
from megatron_lite.train.batch_plan import BatchPlan
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.keeper import Keeper
from megatron_lite.train.progress import Progress
from megatron_lite.train.reading import checksum, count_targets, no_target, read
from megatron_lite.train.step import StepResult, raise_non_finite, train_step, validate

if TYPE_CHECKING:
    from megatron_lite.parallel.pipeline.runner import Pipeline

EARLY_STOPPING = "early stopping"
"""The reason to stop that holds still when a run is started again."""


@dataclasses.dataclass
class Run:
    """Everything a training run consists of, put together by train/start.py."""

    config: RunConfig
    mesh: ProcessMesh
    engine: Engine
    pipeline: Pipeline | None
    plan: BatchPlan
    schedule: Schedule
    progress: Progress
    dropout_seed: int
    curriculum: LengthCurriculum | None
    train_stream: SampleStream
    train_loader: BatchLoader
    valid_loader: BatchLoader | None
    eval_batches: int
    sinks: Sinks
    metrics: Metrics
    memory: MemoryMeter
    pace: Pace
    data_wait: DataWait
    keeper: Keeper
    stop: StopRequest
    flops_per_token: float
    peak_flops: float | None
    run_dir: Path | None
    predicted_peak: Moment


def train(run: Run) -> str:
    """Train to the end of the plan or until a reason to stop; returns that reason.

    The state is saved at the end whatever the reason. Raises NonFiniteError, CheckpointNotSaved where that
    last save failed, SamplesLost for samples that cannot be read, and UserError for those that are damaged or have no
    target.
    """
    started = time.monotonic()
    run.memory.begin()
    # A run that stopped early and is started again has no step before it.
    reason = _early_stop(run)
    while reason is None and run.progress.step < run.plan.total_iterations:
        reason = _one_step(run, started) or _between_steps(run)
    _save(run, is_last=True)
    HERE.begin("end")
    return reason or "done"


def _between_steps(run: Run) -> str | None:
    """Evaluate and save where that is due; a reason to stop."""
    config, step = run.config, run.progress.step
    is_last = step >= run.plan.total_iterations
    if run.valid_loader is not None and (is_last or _is_due(step, config.training.eval_interval)):
        _evaluate(run)
    reason = _early_stop(run)
    if reason is None and not is_last:
        if _is_due(step, config.training.exit_interval):
            return "exit interval"
        if _is_due(step, config.checkpoint.save_interval):
            _save(run)
    return reason


def _early_stop(run: Run) -> str | None:
    progress, patience = run.progress, run.config.training.early_stopping_patience
    if patience is None or progress.validations_without_better < patience:
        return None
    log.note(
        f"no better validation loss than {progress.best_valid_loss:.4f} (step {progress.best_step}) in "
        f"{progress.validations_without_better} validations (--early-stopping-patience {patience}): stopping"
    )
    return EARLY_STOPPING


def _save(run: Run, *, is_last: bool = False) -> None:
    HERE.begin(CHECKPOINT, run.progress.step)
    # Records of steps up to the checkpoint must be there if a run goes on from it.
    run.sinks.flush()
    run.keeper.save(run.engine, run.progress, is_last=is_last, deadline=run.stop.deadline)


def _one_step(run: Run, started: float) -> str | None:
    """Train one step; a reason to stop instead, agreed by all ranks."""
    began = time.perf_counter()
    progress, plan, mesh = run.progress, run.plan, run.mesh
    HERE.begin(STEP, progress.step + 1)
    HERE.note("reading samples")
    limit = run.config.training.exit_duration_in_mins
    if limit is not None and time.monotonic() - started >= 60 * limit:
        run.stop.ask("exit duration")
    batch_size = plan.global_batch_size(progress.consumed_samples)

    def count(batches: list[MicroBatch]) -> list[float]:
        fed = (count_targets(batches, mesh), checksum(batches, mesh))
        return [*fed, run.stop.reason is not None, run.keeper.has_ended]

    asked_at = time.perf_counter()
    micro_batches, (target_tokens, samples_sum, asked, saves_ended) = read(
        run.train_loader, mesh, progress.consumed_samples, batch_size, count
    )
    waited = time.perf_counter() - asked_at
    if saves_ended == mesh.world_size:
        run.keeper.settle()
    if asked:
        return next(reason for reason in mesh.gather_json(run.stop.reason) if reason)
    if not target_tokens:
        skipped = parse_skip_ranges(run.config.training.skip_samples)
        consumed = progress.consumed_samples
        first, last = (stream_position(at, skipped) for at in (consumed, consumed + batch_size - 1))
        raise no_target(
            f"step {progress.step + 1}, samples {first:,} to {last:,}",
            f"leave these samples out (--skip-samples {first}:{last + 1}), or take larger batches",
        )
    _note_length(run)
    rate = run.schedule.learning_rate(progress.step, progress.consumed_samples)
    result = train_step(
        run.engine,
        mesh,
        micro_batches,
        target_tokens=int(target_tokens),
        step=progress.step + 1,
        seed=run.dropout_seed,
        learning_rate=rate,
        pipeline=run.pipeline,
        look=_look_of(run, progress.step + 1),
        before_change=run.keeper.allow_change,
    )
    for line in run.train_stream.changes(progress.consumed_samples, progress.consumed_samples + batch_size):
        log.note(line)
    progress.step += 1
    progress.consumed_samples += batch_size
    progress.consumed_tokens += int(target_tokens)
    progress.skipped_steps += result.outcome.skipped
    run.memory.note_step()
    run.metrics.record("samples_crc32", int(samples_sum) % 2**32)
    seconds = time.perf_counter() - began
    run.metrics.record("data_wait_share", run.data_wait.share(waited, seconds))
    _log_step(run, result, rate, batch_size, seconds)
    return None


def _note_length(run: Run) -> None:
    """Record how long sequences are in the step about to be taken, and say it where that is new."""
    if run.curriculum is None:
        return
    step, length = run.progress.step, run.curriculum.length(run.progress.consumed_samples)
    run.metrics.record("curriculum_seq_length", length)
    before = run.plan.consumed_at(step - 1) if step else None
    if before is None or run.curriculum.length(before) != length:
        log.note(f"step {step + 1}: sequences of {length:,} tokens")


def _look_of(run: Run, step: int) -> Callable[[Engine], None] | None:
    """What is asked of weights and gradients before this step is taken, if anything."""
    options = run.config.logging
    wants_histograms = _is_due(step, options.log_histograms_interval)
    compares = _compares_replicas(run, step)
    if not (wants_histograms or options.log_num_zeros_in_grad or compares):
        return None

    def look(engine: Engine) -> None:
        if compares:
            engine.compare_replicas(step)
        if not (wants_histograms or options.log_num_zeros_in_grad):
            return
        gradients = list(engine.named_gradients())
        if wants_histograms:
            run.sinks.histograms(step, histograms(engine.named_weights(), gradients))
        if options.log_num_zeros_in_grad:
            run.metrics.record("num_zeros_in_grad", _count_zeros(run, gradients))

    return look


def _compares_replicas(run: Run, step: int) -> bool:
    """Whether ranks are to compare their weights in this step, before it changes them.

    It must be before: ZeRO then sends every weight from its owner to all others.
    """
    config = run.config
    interval = config.training.check_weights_interval
    is_saved = run.keeper.root is not None and any(
        (_is_due(step, config.checkpoint.save_interval), _is_due(step, config.training.exit_interval))
    )
    return interval is not None and (_is_due(step, interval) or is_saved or step == run.plan.total_iterations)


def _count_zeros(run: Run, gradients: list[tuple[str, torch.Tensor]]) -> int:
    """Zero elements of the global gradient; padding of the vocabulary is not a part of it."""
    zeros = 0
    if run.mesh.rank(*REPLICAS) == 0:
        layouts = {name: p.mesh_layout for name, p in run.engine.module.named_parameters()}
        for name, gradient in gradients:
            if layouts[name].is_owner:
                zeros += sum(int((part == 0).sum()) for part in layouts[name].parts(gradient))
    return int(run.mesh.sum_numbers([zeros])[0])


def _log_step(run: Run, result: StepResult, rate: float, batch_size: int, seconds: float) -> None:
    progress = run.progress
    values = {
        "step": progress.step,
        "loss": result.loss,
        "lr": rate,
        "grad_norm": result.outcome.grad_norm,
        "loss_scale": result.outcome.loss_scale,
        "skipped_steps": progress.skipped_steps,
        "global_batch_size": batch_size,
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_tokens,
        **throughput(
            tokens=batch_size * run.config.data.seq_length,
            seconds=seconds,
            world_size=run.mesh.world_size,
            flops_per_token=run.flops_per_token,
            peak_flops=run.peak_flops,
        ),
        **run.memory.metrics(),
        **run.pace.metrics(progress.step),
    }
    for name, value in values.items():
        run.metrics.record(name, value)
    run.sinks.write(run.metrics.collect())


def _evaluate(run: Run) -> None:
    """Validate, log it, and keep the checkpoint apart if it is the best so far."""
    batch_size = run.plan.stages[-1].batch_size
    loss = validate(
        run.engine, run.mesh, run.valid_loader, run.eval_batches, batch_size, lambda: run.stop.reason is not None
    )
    if loss is None:
        log.note(f"the validation after step {run.progress.step} is broken off: this run is asked to stop")
        return
    if not math.isfinite(loss):
        raise_non_finite(run.engine, run.mesh, run.progress.step, loss, what="validation loss")
    run.metrics.record("step", run.progress.step)
    run.metrics.record("valid_loss", loss)
    run.metrics.record("valid_perplexity", math.exp(min(loss, 700.0)))
    run.sinks.write(run.metrics.collect())
    if run.progress.note_validation(loss):
        _save(run)


def _is_due(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0
