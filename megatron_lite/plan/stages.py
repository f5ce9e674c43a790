"""The pipeline stages of a configuration: as it lays them out, or balanced by what layers and head compute."""

from __future__ import annotations

import dataclasses

from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.pipeline.partition import Stage, balanced_counts, parse_pipeline_layout, stages_of_counts
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.parallel.pipeline.timeline import bubble_share, most_in_flight, timeline
from megatron_lite.plan.flops import forward_flops_per_token
from megatron_lite.plan.parameters import ParameterShape, parameter_shapes


def plan_stages(config: RunConfig, vocab_size: int) -> tuple[Stage, ...]:
    """All stages of the model, in order. Raises ConfigError for a pipeline that does not fit it."""
    model, layout = config.model, config.parallel.pipeline_model_parallel_layout
    if layout is not None:
        return stages_of_counts(parse_pipeline_layout(layout, model.num_layers))
    sizes = {"vocab_size": vocab_size, "seq_length": config.data.seq_length}
    layer = forward_flops_per_token(dataclasses.replace(model, num_layers=1), **sizes)
    head = forward_flops_per_token(dataclasses.replace(model, num_layers=0), **sizes)
    # Looking a token up is no arithmetic worth counting.
    counts = balanced_counts(model.num_layers, pipeline_plan(config).stages, embedding=0.0, head=head / (layer - head))
    return stages_of_counts(counts)


def stages_of_rank(config: RunConfig, vocab_size: int, pipe_rank: int) -> list[Stage]:
    """The stages that a pipe rank holds, in order."""
    stages = plan_stages(config, vocab_size)
    return [stages[index] for index in pipeline_plan(config).held_by(pipe_rank)]


def shapes_of_rank(config: RunConfig, vocab_size: int, pipe_rank: int) -> list[ParameterShape]:
    """The parameters that the ranks of a pipe rank hold; a tied head's weight on the first and on the last stage's."""
    held = stages_of_rank(config, vocab_size, pipe_rank)
    layers = {n for stage in held for n in stage.layers}
    begins, ends = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
    is_tied = not config.model.untie_embeddings_and_output_weights
    every = parameter_shapes(
        config.model,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        tensor_size=config.parallel.tensor_model_parallel_size,
    )

    def is_here(name: str) -> bool:
        part, _, rest = name.partition(".")
        if part == "layers":
            return int(rest.partition(".")[0]) in layers
        if name == "embedding.word.weight":
            return begins or (ends and is_tied)
        return begins if part == "embedding" else ends

    return [shape for shape in every if is_here(shape.name)]


def chunks_in_flight(config: RunConfig, micro_batches: int, pipe_rank: int) -> int:
    """Stages times micro-batches whose activations a pipe rank holds at once, at most."""
    plan, pipe = pipeline_plan(config), config.parallel.pipeline_model_parallel_size
    held = len(plan.held_by(pipe_rank))
    most = held * micro_batches
    if plan.orders is not None:
        return most_in_flight(plan.orders[pipe_rank])
    later = pipe - pipe_rank - 1
    in_a_round = micro_batches // max(1, micro_batches // pipe)
    return min(
        most,
        {
            "1F1B": later + 1,
            "Interleaved1F1B": (held - 1) * in_a_round + 2 * later + 1,
            "InterleavedZeroBubble": held * in_a_round,
            "ZBVZeroBubble": min(2 * pipe, micro_batches + 1 + pipe_rank),
            "DualPipeV": 2 * pipe + 1,
        }.get(plan.schedule.name, most),
    )


def idle_and_busy(config: RunConfig, micro_batches: int) -> tuple[float, float]:
    """How long a rank of the pipeline waits in a step and how long it works, on average, in units of a micro-batch's
    forward through a stage.

    Backward takes two units, half of them for gradients of inputs, all stages take as long, and sending no time. The
    bubble is idle / (idle + busy). With p ranks and as many micro-batches as a schedule is made for, idle is p - 1
    times what one micro-batch takes in a stage, or p - 1 where gradients of weights fill the rest (Qi et al. 2023).
    """
    plan, pipe = pipeline_plan(config), config.parallel.pipeline_model_parallel_size
    if plan.orders is not None:
        spans = timeline(plan.orders)
        busy = sum(span.stop - span.start for rank in spans for span in rank) / pipe
        share = bubble_share(spans)
        return busy * share / (1.0 - share), busy
    held = plan.stages // pipe
    lacking = max(0, pipe - micro_batches)
    idle = {
        "Interleaved1F1B": 3 * (pipe - 1 + (held - 1) * lacking),
        "LoopedBFS": 3 * (pipe - 1 + (held - 1) * lacking),
        "InterleavedZeroBubble": pipe - 1 + held * lacking + (held - 1) * max(0, pipe - 2 * micro_batches),
        "ZBVZeroBubble": max(pipe - 1, 2 * (2 * pipe - 1 - micro_batches)),
        "DualPipeV": pipe - 1,
    }.get(plan.schedule.name, 3 * (pipe - 1))
    return idle, 3 * held * micro_batches


def heads_in_flight(config: RunConfig, micro_batches: int) -> int:
    """Micro-batches whose logits the last stage holds at once, about."""
    plan = pipeline_plan(config)
    if plan.schedule.name == "1F1B":
        return 1
    if plan.schedule.name == "Interleaved1F1B":
        return min(2, micro_batches)
    last = plan.placement[-1]
    return -(-chunks_in_flight(config, micro_batches, last) // len(plan.held_by(last)))
