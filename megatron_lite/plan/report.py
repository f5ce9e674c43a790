"""The text of `--dry-run`: what a configuration comes to, before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.pipeline.partition import Stage
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.plan.communication import by_axes, sent_in_a_step
from megatron_lite.plan.flops import flops_per_token
from megatron_lite.plan.memory import (
    GRANULARITIES,
    Moment,
    checkpoint_bytes,
    host_copy_bytes,
    micro_batches,
    moments,
    peak,
)
from megatron_lite.plan.optimizer import is_coded, slot_line
from megatron_lite.plan.parameters import count_parameters, padded_vocab_size, parameter_shapes
from megatron_lite.plan.stages import chunks_in_flight, idle_and_busy, shapes_of_rank, stages_of_rank


def dry_run_report(
    config: RunConfig,
    world_size: int,
    vocab_size: int,
    *,
    device_type: str,
    batch_lines: Sequence[str] = (),
    total_samples: int | None = None,
    samples_per_epoch: int | None = None,
    reduce_bucket_size: int = 500_000_000,
) -> list[str]:
    """Lines of plain text: settings, batch, parameters, FLOPs, memory of a rank, size of a checkpoint.

    `device_type` is "cpu" or "cuda", which keep different things in memory.
    `batch_lines` are the sums of the batch plan and `total_samples` its length; `samples_per_epoch`
    is the size of the training set where it is known. `world_size` is a multiple of the ranks that hold one copy of
    the model.
    """
    data_size = world_size // config.parallel.model_parallel_size
    memory = {"data_size": data_size, "device_type": device_type, "reduce_bucket_size": reduce_bucket_size}
    return [
        *_settings(config),
        "",
        "batch",
        *(f"  {line}" for line in batch_lines),
        *_length(total_samples, samples_per_epoch),
        "",
        *_parameters(config, vocab_size),
        "",
        *_pipeline(config, vocab_size, memory),
        *_compute(config, vocab_size, world_size, data_size, total_samples),
        "",
        *_communication(config, vocab_size, data_size),
        *_memory(config, vocab_size, memory),
        "",
        *_checkpoint(config, vocab_size, data_size),
    ]


def _settings(config: RunConfig) -> list[str]:
    lines = ["settings (those that differ from the defaults)"]
    for section in dataclasses.fields(config):
        chosen = getattr(config, section.name)
        default = type(chosen)()
        for field in dataclasses.fields(chosen):
            value = getattr(chosen, field.name)
            if value != getattr(default, field.name):
                lines.append(f"  {section.name + '.' + field.name:<46} {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _length(total_samples: int | None, samples_per_epoch: int | None) -> list[str]:
    if not total_samples or not samples_per_epoch:
        return []
    epochs = total_samples / samples_per_epoch
    return [f"  {epochs:.3g} epochs = {total_samples:,} of {samples_per_epoch:,} sequences an epoch"]


def _parameters(config: RunConfig, vocab_size: int) -> list[str]:
    tensor = config.parallel.tensor_model_parallel_size
    count = count_parameters(config.model, vocab_size=vocab_size, seq_length=config.data.seq_length, tensor_size=tensor)
    lines = ["parameters"]
    for name, number in count.by_component.items():
        lines.append(f"  {name:<20} {number:>18,}  {number / count.total:6.1%}")
    lines += [
        f"  {'total':<20} {count.total:>18,}",
        f"  {'trainable':<20} {count.trainable:>18,}",
        f"  {'without embeddings':<20} {count.without_embedding:>18,}",
    ]
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, tensor)
    padding = f"; {vocab_size:,} tokens in {rows:,} rows" if rows != vocab_size else ""
    lines.append(
        f"  {'on a tensor rank':<20} {count.on_rank:>18,}  of {tensor} tensor ranks, as laid out in memory{padding}"
    )
    return lines


def _pipeline(config: RunConfig, vocab_size: int, memory: dict[str, Any]) -> list[str]:
    """What each rank of a pipeline holds; nothing where there is none."""
    pipe = config.parallel.pipeline_model_parallel_size
    if pipe == 1:
        return []
    plan, count = pipeline_plan(config), micro_batches(config, memory["data_size"])
    lines = [f"pipeline ({plan.schedule.name}: {plan.stages} stages on {pipe} ranks, {count} micro-batches)"]
    for rank in range(pipe):
        held = ", ".join(_shown_stage(stage) for stage in stages_of_rank(config, vocab_size, rank))
        elements = sum(shape.local_elements for shape in shapes_of_rank(config, vocab_size, rank))
        most = max(moments(config, vocab_size=vocab_size, pipe_rank=rank, **memory), key=lambda moment: moment.total)
        lines.append(
            f"  rank {rank}  {held}; {elements:,} parameters; {chunks_in_flight(config, count, rank)} in flight; "
            f"peak {size(most.total)}"
        )
    idle, busy = idle_and_busy(config, count)
    lines.append(
        f"  bubble  {idle / (idle + busy):.1%} of the time = {idle:g} / ({busy:g} + {idle:g}), in units of a stage's "
        "forward, with backward two of them"
    )
    return [*lines, ""]


def _shown_stage(stage: Stage) -> str:
    first, count = stage.layers.start, len(stage.layers)
    layers = ("no layer", f"layer {first}", f"layers {first}-{first + count - 1}")[min(count, 2)]
    return "embedding, " * stage.is_first + layers + ", output layer" * stage.is_last


def _compute(
    config: RunConfig, vocab_size: int, world_size: int, data_size: int, total_samples: int | None
) -> list[str]:
    shape = {"vocab_size": vocab_size, "seq_length": config.data.seq_length}
    token = flops_per_token(config.model, **shape)
    causal = flops_per_token(config.model, **shape, causal=True)
    tokens = config.training.batch_size(data_size) * config.data.seq_length
    lines = [
        "model FLOPs (forward and backward, attention as a full square; recompute not counted)",
        f"  a token  {flops(token)}  ({flops(causal)} with the causal half of attention alone)",
        f"  a step   {flops(token * tokens)} = {flops(token)} x {tokens:,} tokens; "
        f"{flops(token * tokens / world_size)} on each of {world_size} ranks",
    ]
    if total_samples:
        total = total_samples * config.data.seq_length
        lines.append(f"  the run  {flops(token * total)} = {flops(token)} x {total:,} tokens")
    return lines


def _communication(config: RunConfig, vocab_size: int, data_size: int) -> list[str]:
    """What the rank that sends most sends; nothing where there is one rank."""
    places = range(config.parallel.pipeline_model_parallel_size)
    options = {"data_size": data_size, "vocab_size": vocab_size}
    ranks = [sent_in_a_step(config, pipe_rank=place, **options) for place in places]
    sent = max(ranks, key=lambda entries: sum(entry.bytes for entry in entries))
    if not sent:
        return []
    where = f" of pipeline rank {ranks.index(sent)}, which sends most," if len(ranks) > 1 else ""
    lines = [f"communication{where} in a step, bytes sent by a rank (sums and gathers go round a ring)"]
    for axes, total in by_axes(sent).items():
        parts = sorted((entry for entry in sent if "+".join(entry.axes) == axes), key=lambda entry: -entry.bytes)
        told = " + ".join(f"{entry.purpose} {size(float(entry.bytes))}" for entry in parts)
        lines.append(f"  {axes:<14} {size(float(total)):>9}  = {told}")
    return [*lines, ""]


def _memory(config: RunConfig, vocab_size: int, arguments: dict[str, Any]) -> list[str]:
    precision, stage = config.precision.dtype, config.effective_zero_stage
    context = config.parallel.context_parallel_size
    sharing = f" x {context} context" if context > 1 else ""
    lines = [
        f"memory of a rank on {_DEVICES[arguments['device_type']]} at its highest, by recompute ({precision}, ZeRO "
        f"{stage} over {arguments['data_size']} data{sharing} ranks, {config.training.micro_batch_size} x "
        f"{config.data.seq_length // context:,} tokens; * is chosen)",
        f"    {'recompute':<10}" + "".join(f"{name:>12}" for name in (*_PARTS, "peak")) + "  at",
    ]
    for granularity in GRANULARITIES:
        moment = peak(config, vocab_size=vocab_size, granularity=granularity, **arguments)
        chosen = "*" if granularity == config.training.recompute_granularity else " "
        cells = "".join(f"{size(getattr(moment, name)):>12}" for name in _PARTS)
        lines.append(f"  {chosen} {granularity:<10}{cells}{size(moment.total):>12}  {moment.name}")
    return lines


_DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}
_PARTS = ("weights", "gradients", "optimizer", "activations", "temporary", "libraries")


def memory_comparison(predicted: Moment, in_use: int, process: int) -> str:
    """One line at the end of a run: the peak that was planned beside the peak of what was in use, in bytes.

    `process` is the growth of the whole process, or of what torch's allocator reserved on a GPU.
    """
    return (
        f"peak memory of a rank: predicted {size(predicted.total)} ({predicted.name}), measured {size(in_use)} "
        f"above what the process held before the model, {predicted.total / max(1, in_use):.0%}; "
        f"with what the allocator keeps for reuse {size(process)}"
    )


def _checkpoint(config: RunConfig, vocab_size: int, data_size: int) -> list[str]:
    shapes = list(parameter_shapes(config.model, vocab_size=vocab_size, seq_length=config.data.seq_length))
    total = sum(shape.elements for shape in shapes)
    coded = sum(shape.elements for shape in shapes if is_coded(config.optimizer, shape))
    slots = 0 if config.checkpoint.no_save_optim else len(config.optimizer.slots)
    kept = f" and {slots} optimizer slots" if slots else ""
    whole = checkpoint_bytes(config, total, coded)
    beside = []
    if config.checkpoint.save is not None and config.checkpoint.async_save:
        copied = size(host_copy_bytes(config, vocab_size, data_size))
        beside = [f"saves beside training take up to {copied} of host memory on a rank (--no-async-save: none)"]
    return [
        slot_line(config.optimizer, shapes),
        f"a checkpoint is {size(whole)} = {whole / total:.4g} bytes x {total:,} parameters (fp32 masters{kept})",
        *beside,
    ]


def size(number: float) -> str:
    """Bytes with three digits and a binary unit: 1.24 GiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= 0.9995 * factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def flops(number: float) -> str:
    """FLOPs with three digits and a letter: 854 MFLOP."""
    for letter, factor in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{_three_digits(number / factor)} {letter}FLOP"
    return f"{number:.0f} FLOP"


def _three_digits(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:.0f}"
