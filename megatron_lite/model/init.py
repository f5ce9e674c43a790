"""Initial weights, equal under every layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.layout import ParameterLayout

RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` in place, one at a time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.mesh_layout, config, seed))


def initial_value(name: str, layout: ParameterLayout, config: ModelConfig, seed: int) -> torch.Tensor:
    """This rank's part of the initial value of parameter `name`, fp32 on the CPU.

    The global tensor is drawn from a generator whose seed is made of `seed` and the name, and cut. Norms
    begin at 1 and biases at 0. Matrices are normal, residual outputs with a standard deviation divided
    by sqrt(2 num_layers) (Radford et al. 2019), or Xavier-uniform over the global shape (Glorot and
    Bengio 2010); embeddings are normal in either case. Padding is 0.
    """
    if name.endswith("bias"):
        return torch.zeros(layout.local_shape)
    if name.endswith("norm.weight"):
        return torch.ones(layout.local_shape)
    value = torch.empty(layout.global_shape)
    generator = torch.Generator().manual_seed(name_seed(name, seed))
    if config.init_method == "xavier_uniform" and not name.startswith("embedding."):
        bound = math.sqrt(6.0 / sum(layout.global_shape))
        value.uniform_(-bound, bound, generator=generator)
    else:
        scaled = name.endswith(RESIDUAL_OUTPUTS)
        deviation = config.init_method_std / (math.sqrt(2 * config.num_layers) if scaled else 1.0)
        value.normal_(0.0, deviation, generator=generator)
    return layout.cut(value)


def name_seed(name: str, seed: int) -> int:
    """63 bits made of a run's seed and a parameter's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
