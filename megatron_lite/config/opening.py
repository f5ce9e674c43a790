"""What opens a trained model: the checkpoint, the ranks it is spread over, and where its tokenizer is now."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_lite.config.data import TokenizerType


@dataclasses.dataclass(frozen=True)
class OpeningConfig:
    """A checkpoint, and how its model is put on the ranks that were started."""

    load: str
    """Folder of a run's checkpoints (its --save folder), or of one checkpoint."""
    ckpt_step: int | None = None
    """Step to load; default: the newest complete one."""
    tensor_model_parallel_size: int | None = None
    """Ranks that share the model, whatever it was trained on; default: all that were started."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of weights and activations; default: that of training, but fp32 on a CPU."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer, for a checkpoint that names none. It must be the tokenizer of training."""
    tokenizer_model: str | None = None
    """SentencePiece .model, tokenizer.json or tiktoken rank file; default: the copy beside the checkpoint."""
    vocab_file: str | None = None
    """GPT2BPETokenizer: encoder.json (token to id)."""
    merge_file: str | None = None
    """GPT2BPETokenizer: vocab.bpe (merges)."""
    local_rank: int | None = None
    """Passed by the deepspeed launcher; the environment says the same."""

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """What replaces fields of the checkpoint's configuration."""
        names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
        return {"data": {name: getattr(self, name) for name in names if getattr(self, name) is not None}}
