"""AdamW in place, over a list of tensors with fp32 state. The formula is in csrc/adamw/adamw.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_lite.kernels.arguments import DTYPES
from megatron_lite.kernels.operators import define


@torch.no_grad()
def adamw(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    first_moments: Sequence[torch.Tensor],
    second_moments: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One step of AdamW on all parameters, in place, in one pass over memory.

    parameters: fp32, bf16 or fp16, contiguous, all on one device; a 16-bit one is updated in fp32 and rounded once.
    gradients: of the parameters' shapes, any strides, fp32, bf16 or fp16. first_moments, second_moments: fp32 of
    the parameters' shapes, contiguous, zeros before the first step. step: from 1. A NaN or infinity of a gradient
    reaches its own element's parameter and moments, no other. No gradient flows through it. Raises TypeError for a
    dtype, ValueError for a shape, a device, strides or a number that will not do. Loshchilov and Hutter 2019; the same
    update as torch.optim.AdamW.
    """
    check_rule("adamw", step, lr, betas, epsilon, weight_decay)
    check_tensors("adamw", parameters, gradients)
    shapes = [parameter.shape for parameter in parameters]
    check_state("adamw", parameters, "first_moments", first_moments, shapes, torch.float32)
    check_state("adamw", parameters, "second_moments", second_moments, shapes, torch.float32)
    if parameters:
        tensors = map(list, (parameters, gradients, first_moments, second_moments))
        _adamw(*tensors, step, lr, *betas, epsilon, weight_decay)
        torch.autograd.graph.increment_version(parameters)


def check_rule(
    operation: str, step: int, lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> None:
    """Raise ValueError for a number that AdamW cannot work with."""
    if step < 1:
        raise ValueError(f"{operation}: step={step}; steps are counted from 1, since 1 - beta^0 divides by 0")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{operation}: {name}={beta}; at least 0 and below 1 is needed")
    for name, number in (("lr", lr), ("epsilon", epsilon), ("weight_decay", weight_decay)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{operation}: {name}={number}; a number from 0 on is needed")


def check_tensors(operation: str, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Raise TypeError or ValueError unless parameters can be updated in place, by gradients that fit them."""
    if len(gradients) != len(parameters):
        raise ValueError(f"{operation}: {len(gradients)} gradients for {len(parameters)} parameters")
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        for name, tensor in (("parameter", parameter), ("gradient", gradient)):
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{operation}: {name} {index} is {tensor.dtype}; float32, bfloat16 and float16 are possible"
                )
            if tensor.device != parameters[0].device:
                raise ValueError(
                    f"{operation}: {name} {index} is on {tensor.device} and parameter 0 on {parameters[0].device}; "
                    "call it for each device"
                )
        if gradient.shape != parameter.shape:
            raise ValueError(
                f"{operation}: gradient {index} has shape {tuple(gradient.shape)} and its parameter "
                f"{tuple(parameter.shape)}; they must be equal"
            )
        _check_contiguous(operation, f"parameter {index}", parameter)


def check_state(
    operation: str,
    parameters: Sequence[torch.Tensor],
    name: str,
    state: Sequence[torch.Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError unless there is a tensor of its shape, contiguous, for every parameter."""
    if len(state) != len(parameters):
        raise ValueError(f"{operation}: {len(state)} {name} for {len(parameters)} parameters")
    for index, (parameter, tensor, shape) in enumerate(zip(parameters, state, shapes, strict=True)):
        if tensor.dtype != dtype:
            raise TypeError(f"{operation}: {name}[{index}] is {tensor.dtype}; {dtype} is needed")
        if tensor.device != parameter.device:
            raise ValueError(
                f"{operation}: {name}[{index}] is on {tensor.device} and its parameter on {parameter.device}; move it"
            )
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{operation}: {name}[{index}] has shape {tuple(tensor.shape)} and its parameter "
                f"{tuple(parameter.shape)}; {tuple(shape)} is needed"
            )
        _check_contiguous(operation, f"{name}[{index}]", tensor)


def _check_contiguous(operation: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; what is updated in "
            "place must be contiguous"
        )


def updated(parameter, gradient, m, v, step, lr, beta1, beta2, epsilon, weight_decay):
    """The reference of one tensor's step: parameter, m and v anew, in fp32."""
    g = gradient.float()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + epsilon
    return parameter.float() * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator), m, v


def _reference(parameters, gradients, first_moments, second_moments, *rule):
    for tensors in zip(parameters, gradients, first_moments, second_moments, strict=True):
        parameter, _, m, v = tensors
        for tensor, value in zip((parameter, m, v), updated(*tensors, *rule), strict=True):
            tensor.copy_(value)


def _fake(*arguments):
    return None


_adamw = define(
    "adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
    "int step, float lr, float beta1, float beta2, float epsilon, float weight_decay) -> ()",
    reference=_reference,
    fake=_fake,
)
