"""The parallel layout: how many ranks each axis has, and what is sharded over the data axis."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes. The data size is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split norms and dropouts along the sequence over the tensor ranks (Korthikanti et al. 2022)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 and gradients, 3 and parameters, over the data ranks."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON merged into the derived one; a value that contradicts a flag is an error."""
    distributed_timeout_minutes: float = 10.0
    """Longest a collective may take."""
