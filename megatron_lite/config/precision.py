"""The precision of training."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number format of weights and activations; masters and optimizer state are fp32."""

    fp16: bool = False
    """Train in fp16 with a loss scale (GPU only)."""
    bf16: bool = False
    """Train in bf16."""
    loss_scale: float | None = None
    """Fixed fp16 loss scale; default: dynamic."""
    initial_loss_scale: float = 65536.0
    """First value of the dynamic loss scale; a power of two."""
    min_loss_scale: float = 1.0
    """Lowest dynamic loss scale."""
    loss_scale_window: int = 1000
    """Good steps before the dynamic loss scale doubles."""
    hysteresis: int = 2
    """Overflows before the dynamic loss scale halves."""

    @property
    def dtype(self) -> str:
        """ "fp32", "bf16" or "fp16"."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"
