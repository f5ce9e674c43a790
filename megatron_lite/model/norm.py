"""Layer norm and RMS norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.layout import replicated
from megatron_lite.parallel.linear import TensorAxis, empty_parameter
from megatron_lite.parallel.process_mesh import ProcessMesh


class Norm(nn.Module):
    """A norm over the last dim with a learned scale, and with a learned shift for "LayerNorm".

    [S, B, H] -> [S, B, H]; weights are replicated over tensor ranks. LayerNorm: Ba et al. 2016;
    RMSNorm: Zhang and Sennrich 2019.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        epsilon: float,
        mesh: ProcessMesh,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layout = replicated((hidden_size,), mesh.rank("tensor"))
        self._epsilon = epsilon
        self.weight = empty_parameter(layout, device=device, dtype=dtype)
        self.bias = empty_parameter(layout, device=device, dtype=dtype) if kind == "LayerNorm" else None

    def forward(self, hidden: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        weight = axis.shared(self.weight)
        if self.bias is None:
            return rms_norm(hidden, weight, self._epsilon)
        return layer_norm(hidden, weight, axis.shared(self.bias), self._epsilon)


def layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(hidden - mean) / sqrt(variance + epsilon) * weight + bias over the last dim, fp32 inside."""
    return F.layer_norm(hidden, weight.shape, weight, bias, epsilon)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """hidden / sqrt(mean(hidden^2) + epsilon) * weight over the last dim, fp32 inside."""
    return _RMSNorm.apply(hidden, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + epsilon) and m = mean(dy w x): dx = r dy w - r^3 m x, dw = sum of r dy x.

    Torch's own takes some twice the time on a CPU.
    """

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        values = hidden.float()
        inverse = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        inverse.square_().div_(values.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (values * inverse).mul_(weight).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, inverse = ctx.saved_tensors
        values, scale = hidden.float(), weight.float()
        product = (gradient.float() * values).reshape(-1, weight.numel())
        weight_gradient = torch.mv(product.t(), inverse.flatten())
        mean = torch.mv(product, scale).div_(weight.numel()).view(inverse.shape)
        hidden_gradient = (gradient * scale).mul_(inverse).addcmul_(values, inverse**3 * mean, value=-1)
        return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), None
