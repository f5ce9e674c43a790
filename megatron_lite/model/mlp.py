"""The feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.linear import ColumnParallelLinear, RowParallelLinear, TensorAxis
from megatron_lite.parallel.process_mesh import ProcessMesh


class MLP(nn.Module):
    """Up, activation, down: [S, B, H] -> [S, B, H]. With `swiglu`, silu(gate) * up (Shazeer 2020).

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

    def forward(self, hidden_SBH: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        entered = axis.enter(hidden_SBH)
        inner = swiglu(self.gate_up(entered)) if self._gated else self._activation(self.up(entered))
        return self.down(inner, axis)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of the two halves of the last dim."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, and writes the gradients of both halves where they belong: autograd would
    keep silu(gate) too, and join the halves by another pass."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        gate_up_gradient = torch.empty_like(gate_up)
        gate_gradient, up_gradient = gate_up_gradient.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=up_gradient)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=gate_gradient)
        return gate_up_gradient


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    """GELU by the tanh formula of GPT-2 (Hendrycks and Gimpel 2016)."""
    return F.gelu(values, approximate="tanh")


def squared_relu(values: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (So et al. 2021)."""
    return F.relu(values).square()


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": F.gelu, "relu": F.relu, "squared_relu": squared_relu}
