"""The parallel layout: how many ranks each axis has, and what is sharded over the data axis."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes. The data size is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split norms and dropouts along the sequence over the tensor ranks (Korthikanti et al. 2022)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, each with a stretch or several of them."""
    pipeline_schedule: str | None = None
    """Order of forward and backward passes: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble,
    ZBVZeroBubble, DualPipeV, or a CSV file; default 1F1B, with several stages on a rank Interleaved1F1B."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages a pipeline rank holds."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """The same, by the layers of a stage."""
    pipeline_model_parallel_layout: str | None = None
    """Which stage holds what, such as Et*3|t*5|t*4L; default: stages that cost about the same."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"
    """How they attend to one another's tokens: keys and values go round a ring (p2p), or each rank takes whole
    sequences of some heads (a2a)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 and gradients, 3 and parameters, over the data and
    context ranks."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON merged into the derived one; a value that contradicts a flag is an error."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data and context ranks while backward makes others, bucket by bucket; without a pipeline."""
    ddp_bucket_size: int = 16_777_216
    """Gradients that are summed at once, in elements, where ZeRO is 0, or 1 with overlap_grad_reduce."""
    distributed_timeout_minutes: float = 10.0
    """Longest a collective may take."""
    hang_limit_minutes: float | None = None
    """Longest a step, or a batch of a validation, may take: the run then ends, with a page that says which rank is
    behind and where the others wait; 0 is never. Default: 10 times the slowest of the last 50, at least 1 minute. Each
    micro-batch of the first has distributed_timeout_minutes."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same sequences; the data size is how often they fit the world."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
