"""The whole configuration: the sum of its sections."""

from __future__ import annotations

import dataclasses

from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.data import DataConfig
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.logging import LoggingConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run is told. Field names are unique over all sections."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @property
    def effective_zero_stage(self) -> int:
        """The ZeRO stage that runs: --zero-stage, but 1 for 0 in bf16 and fp16, whose weights need the
        fp32 masters that ZeRO keeps."""
        return max(self.parallel.zero_stage, 0 if self.precision.dtype == "fp32" else 1)
