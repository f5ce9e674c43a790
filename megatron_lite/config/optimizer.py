"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. Warm-up and decay lengths are given in iterations,
    samples or a fraction of the decay, in one unit only."""

    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """Optimizer; Megatron's "adam" means adamw. adamw8bit keeps both moments of the layers' matrices in 8 bits."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Floor of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "vaswani"] = "cosine"
    """Shape after warm-up; "vaswani" is lr x hidden_size^-0.5 x min(step^-0.5, step x warmup^-1.5)."""
    lr_decay_iters: int | None = None
    """Iterations until min_lr; default: the length of the run."""
    lr_decay_samples: int | None = None
    """Samples until min_lr."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay length."""
    lr_warmup_init: float = 0.0
    """Learning rate the warm-up starts from."""
    weight_decay: float = 0.01
    """Weight decay, decoupled (sgd: added to the gradient); matrices alone, not biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    adam8bit_nearest_codes: bool = False
    """adamw8bit rounds a small second moment to 0, as bitsandbytes and torchao do; else it keeps the smallest code."""
    sgd_momentum: float = 0.9
    """Momentum of sgd."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is no clipping."""
    override_opt_param_scheduler: bool = False
    """On resume, take the learning-rate schedule from the flags instead of the checkpoint."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors the optimizer keeps for each parameter, of its shape."""
        if self.optimizer == "sgd":
            return ("momentum_buffer",) if self.sgd_momentum else ()
        return ("exp_avg", "exp_avg_sq")
