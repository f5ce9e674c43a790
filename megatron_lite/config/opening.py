"""What opens a trained model: the checkpoint, the ranks it is spread over, and where its tokenizer is now."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from megatron_lite.config.tokenizer import TokenizerFiles, TokenizerType


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpeningConfig(TokenizerFiles):
    """A checkpoint, and how its model is put on the ranks that were started."""

    load: str
    """Folder of a run's checkpoints (its --save folder), or of one checkpoint."""
    ckpt_step: int | None = None
    """Step to load; default: the newest complete one."""
    tensor_model_parallel_size: int | None = None
    """Ranks that share the model, whatever it was trained on; default: all that were started."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, each with a stretch of them."""
    distributed_timeout_minutes: float = 10.0
    """Longest that ranks wait for one another."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of weights and activations; default: that of training, but fp32 on a CPU."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer, which must be that of training; default, with its files: the copy beside the checkpoint."""
    local_rank: int | None = None
    """Passed by the deepspeed launcher; the environment says the same."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        minutes = self.distributed_timeout_minutes
        if math.isfinite(minutes) and minutes > 0:
            return []
        return [f"distributed_timeout_minutes={minutes:g} is no time to wait; give more than 0."]

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """What replaces fields of the checkpoint's configuration."""
        names = ("tokenizer_type", *(field.name for field in dataclasses.fields(TokenizerFiles)))
        return {"data": {name: getattr(self, name) for name in names if getattr(self, name)}}
