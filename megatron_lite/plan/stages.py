"""The pipeline stages of a configuration: as it lays them out, or balanced by what layers and head compute."""

from __future__ import annotations

import dataclasses

from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.pipeline.partition import Stage, balanced_counts, parse_pipeline_layout, stages_of_counts
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.plan.flops import forward_flops_per_token


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
