"""Layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.kernels.layer_norm import layer_norm
from megatron_lite.kernels.rms_norm import rms_norm
from megatron_lite.model.apex import nvidia_apex_norms
from megatron_lite.parallel.layout import replicated
from megatron_lite.parallel.linear import TensorAxis, empty_parameter
from megatron_lite.parallel.process_mesh import ProcessMesh

NormFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(hidden, weight, bias, epsilon) to the layer norm of the last dim, or to the RMS norm without a bias."""


class Norm(nn.Module):
    """A norm over the last dim with a learned scale, and with a learned shift for "LayerNorm".

    [S, B, H] -> [S, B, H]; weights are replicated over tensor ranks. LayerNorm: Ba et al. 2016;
    RMSNorm: Zhang and Sennrich 2019. Raises KernelError where the backend is apex and cannot be had.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        kernels: KernelsConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layout = replicated((config.hidden_size,), mesh.rank("tensor"))
        self._epsilon = config.norm_epsilon
        self._norm = norm_function(kernels, torch.device(device or "cpu").type)
        self.weight = empty_parameter(layout, device=device, dtype=dtype)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = empty_parameter(layout, device=device, dtype=dtype)

    def forward(self, hidden: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        bias = None if self.bias is None else axis.shared(self.bias)
        return self._norm(hidden, axis.shared(self.weight), bias, self._epsilon)


def norm_function(kernels: KernelsConfig, device_type: str) -> NormFunction:
    """The norms of --norm-backend. Raises KernelError for apex where NVIDIA's cannot be had."""
    if kernels.norm_backend == "native":
        return _native
    if kernels.norm_backend == "torch":
        return _torch
    return _apex(kernels, device_type)


def _native(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return rms_norm(hidden, weight, epsilon) if bias is None else layer_norm(hidden, weight, bias, epsilon)


def _torch(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    if bias is None:
        return F.rms_norm(hidden, weight.shape, weight, epsilon)
    return F.layer_norm(hidden, weight.shape, weight, bias, epsilon)


def _apex(kernels: KernelsConfig, device_type: str) -> NormFunction:
    norms = nvidia_apex_norms(device_type)
    lean = kernels.memory_efficient_layer_norm

    def norm(hidden, weight, bias, epsilon):
        if bias is None:
            return norms.fused_rms_norm_affine(hidden, weight, weight.shape, epsilon, lean)
        return norms.fused_layer_norm_affine(hidden, weight, bias, weight.shape, epsilon, lean)

    return norm
