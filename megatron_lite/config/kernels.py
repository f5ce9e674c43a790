"""The kernels: which code computes a layer. A choice of speed and memory; no result beyond rounding depends on it."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Which code computes norms, attention and loss. No fact of the model: a run may change it when it goes on."""

    norm_backend: Literal["native", "torch", "apex"] = "native"
    """Norms by this project's kernels, by torch, or by NVIDIA's apex where it is installed."""
    attention_backend: Literal["auto", "sdpa", "fused_softmax"] = "auto"
    """Attention by torch's scaled_dot_product_attention, or by two matrix products around this project's
    softmax kernel, which keeps all probabilities; auto: the latter for dropout on a CPU, else the former."""
    require_native_kernels: bool = False
    """Refuse to start where a kernel would run as its reference in plain torch."""
    memory_efficient_layer_norm: bool = False
    """Norms keep their output, which the next layer keeps anyway, instead of their input for the backward pass. It is
    divided by the weight: none may be 0, and a layer norm whose bias is many times its weight loses digits."""
    loss_chunk_size: int = 0
    """Entries of a rank's vocabulary whose logits are held at once for the loss; 0: all. Saves nearly all of the
    logits' memory for one more matrix product of the output layer, in backward."""
