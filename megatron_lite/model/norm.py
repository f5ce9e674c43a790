"""Layer norm and RMS norm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite import log
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import KernelError
from megatron_lite.kernels.layer_norm import layer_norm, residual_layer_norm
from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm
from megatron_lite.model.apex import nvidia_apex_norms
from megatron_lite.parallel.collectives import copy_to
from megatron_lite.parallel.layout import replicated
from megatron_lite.parallel.linear import TensorAxis, empty_parameter
from megatron_lite.parallel.process_mesh import ProcessMesh

NormFunction = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, float], tuple[torch.Tensor, torch.Tensor]
]
"""(hidden, residual or None, weight, bias, epsilon) to the norm of hidden + residual, and that sum: the layer norm of
the last dim, or the RMS norm where the bias is None."""

_LARGEST_ERROR = 0.05
"""Of a normalised value that is computed back from the output."""


class Norm(nn.Module):
    """A norm over the last dim with a learned scale, and with a learned shift for "LayerNorm".

    [S, B, H] -> [S, B, H], or of another `width`; with a residual of that shape, the norm of its sum with the input,
    and the sum. Weights are replicated over tensor ranks. LayerNorm: Ba et al. 2016; RMSNorm: Zhang and Sennrich 2019.
    Raises KernelError where the backend is apex and cannot be had, and where one that keeps its output has a weight
    of 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        kernels: KernelsConfig,
        *,
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layout = replicated((width or config.hidden_size,), mesh.rank("tensor"))
        self._epsilon = config.norm_epsilon
        self._norm = norm_function(kernels, torch.device(device or "cpu").type)
        self._divides_by_weight = kernels.memory_efficient_layer_norm and kernels.norm_backend != "torch"
        self.weight = empty_parameter(layout, device=device, dtype=dtype)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = empty_parameter(layout, device=device, dtype=dtype)

    def forward(
        self, hidden: torch.Tensor, axis: TensorAxis, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weight = self._shared(self.weight, axis)
        bias = None if self.bias is None else self._shared(self.bias, axis)
        if self._divides_by_weight and torch.is_grad_enabled():
            self._look_at_divisors(hidden.dtype)
        normal, total = self._norm(hidden, residual, weight, bias, self._epsilon)
        return normal if residual is None else (normal, total)

    def _shared(self, parameter: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        return axis.shared(parameter)

    def _look_at_divisors(self, dtype: torch.dtype) -> None:
        """Once, at the first step: to look halts a GPU. A weight that is 0 later gives a NaN, which stops the run."""
        self._divides_by_weight = False
        if self.weight.is_meta:
            return
        zeros = self.weight.numel() - int(self.weight.count_nonzero())
        if zeros:
            raise KernelError(
                f"--memory-efficient-layer-norm divides by the weights of norms, and {zeros} of the "
                f"{self.weight.numel()} weights of one are 0; leave it out"
            )
        if self.bias is not None:
            ratio = (self.bias.detach() / self.weight.detach()).abs().max().item()
            # The output's rounding, half a digit of the bias, divided by the weight; normal values are some 1.
            error = ratio * torch.finfo(dtype).eps / 2
            if error > _LARGEST_ERROR:
                log.once(
                    f"--memory-efficient-layer-norm: the bias of a norm is up to {ratio:.3g} times its weight, which "
                    f"makes normalised values in the gradient wrong by up to {error:.2g} in {dtype}, where "
                    f"{_LARGEST_ERROR} is harmless; leave it out"
                )


class HeadNorm(Norm):
    """A norm of each head by itself, [S, B, N, D] -> [S, B, N, D], that all heads share, those of other ranks too.

    Henry et al. 2020.
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
        super().__init__(config, mesh, kernels, width=config.head_dim, device=device, dtype=dtype)

    def _shared(self, parameter: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        return copy_to(parameter, axis.group)


def norm_function(kernels: KernelsConfig, device_type: str) -> NormFunction:
    """The norms of --norm-backend. Raises KernelError for apex where NVIDIA's cannot be had."""
    if kernels.norm_backend == "torch":
        return _torch
    lean = {"memory_efficient": kernels.memory_efficient_layer_norm}
    if kernels.norm_backend == "native":
        return functools.partial(_native, **lean)
    return functools.partial(_apex, nvidia_apex_norms(device_type), **lean)


def _native(hidden, residual, weight, bias, epsilon, *, memory_efficient):
    vectors = (weight,) if bias is None else (weight, bias)
    if residual is None:
        norm = rms_norm if bias is None else layer_norm
        return norm(hidden, *vectors, epsilon, memory_efficient=memory_efficient), hidden
    norm = residual_rms_norm if bias is None else residual_layer_norm
    return norm(hidden, residual, *vectors, epsilon, memory_efficient=memory_efficient)


def _torch(hidden, residual, weight, bias, epsilon):
    total = hidden if residual is None else hidden + residual
    if bias is None:
        return F.rms_norm(total, weight.shape, weight, epsilon), total
    return F.layer_norm(total, weight.shape, weight, bias, epsilon), total


def _apex(norms, hidden, residual, weight, bias, epsilon, *, memory_efficient):
    total = hidden if residual is None else hidden + residual
    if bias is None:
        return norms.fused_rms_norm_affine(total, weight, weight.shape, epsilon, memory_efficient), total
    return norms.fused_layer_norm_affine(total, weight, bias, weight.shape, epsilon, memory_efficient), total
