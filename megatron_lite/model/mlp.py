"""The feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.kernels.bias_gelu import bias_gelu
from megatron_lite.kernels.swiglu import swiglu
from megatron_lite.parallel.linear import ColumnParallelLinear, RowParallelLinear, TensorAxis, Unbiased
from megatron_lite.parallel.process_mesh import ProcessMesh


class MLP(nn.Module):
    """Up, activation, down: [S, B, H] -> [S, B, H] and a bias to add. With `swiglu`, silu(gate) * up (Shazeer 2020).

    `up.weight` is [F, H], or `gate_up.weight` [2 F, H] with the gate's rows first; `down.weight` [H, F].
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden, inner = config.hidden_size, config.ffn_size
        options = {"bias": config.add_bias_linear, "device": device, "dtype": dtype}
        if config.swiglu:
            self.gate_up = ColumnParallelLinear(hidden, 2 * inner, mesh, sections=(inner, inner), **options)
        else:
            self.up = ColumnParallelLinear(hidden, inner, mesh, **options)
            self._activation = ACTIVATIONS[config.activation_func]
        self._gated = config.swiglu
        self.down = RowParallelLinear(inner, hidden, mesh, **options)

    def forward(self, hidden_SBH: torch.Tensor, axis: TensorAxis) -> Unbiased:
        entered = axis.enter(hidden_SBH)
        inner = swiglu(self.gate_up(entered)) if self._gated else self.up(entered, self._activation)
        return self.down(inner, axis)


def gelu_tanh(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """GELU by the tanh formula of GPT-2 (Hendrycks and Gimpel 2016)."""
    return bias_gelu(values, bias, approximate="tanh")


def gelu(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """GELU by the normal distribution (Hendrycks and Gimpel 2016)."""
    return bias_gelu(values, bias, approximate="none")


def relu(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The larger of the sum and 0."""
    return F.relu(values if bias is None else values + bias)


def squared_relu(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """relu(values + bias)^2 (So et al. 2021)."""
    return relu(values, bias).square()


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "relu": relu, "squared_relu": squared_relu}
"""Activations of values + bias, by --activation-func."""
