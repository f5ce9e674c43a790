"""What the rooms that know rules find wrong with a configuration, together. No torch."""

from __future__ import annotations

from megatron_lite.config import check
from megatron_lite.config.run import RunConfig
from megatron_lite.data import rules as data_rules
from megatron_lite.parallel.pipeline import rules as pipeline_rules
from megatron_lite.train import deepspeed_config


def problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything that keeps a configuration from running on `world_size` ranks, one sentence each."""
    return [
        *check.problems(config, world_size),
        *data_rules.problems(config),
        *pipeline_rules.problems(config, world_size),
        *deepspeed_config.problems(config, world_size),
    ]
