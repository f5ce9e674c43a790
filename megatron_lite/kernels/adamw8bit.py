"""AdamW in place with moments of 8 bits. The rule is in csrc/adamw8bit/adamw8bit.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_lite.kernels.adamw import check_rule, check_state, check_tensors, updated
from megatron_lite.kernels.code_maps import SIGNED, blocks
from megatron_lite.kernels.operators import define
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise, keep_above_zero, quantize_blockwise


class State8bit(NamedTuple):
    """The moments of one parameter, `quantize_blockwise`'s codes and absmax: 2 bytes an element, 8 a block of 256."""

    first_codes: torch.Tensor
    """uint8 in the parameter's shape, by the signed map."""
    first_absmax: torch.Tensor
    """fp32 [blocks]."""
    second_codes: torch.Tensor
    """uint8 in the parameter's shape, by the unsigned map."""
    second_absmax: torch.Tensor
    """fp32 [blocks]."""

    @classmethod
    def zeros(cls, parameter: torch.Tensor) -> State8bit:
        """The state before the first step."""
        codes = torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
        absmax = torch.zeros(blocks(parameter.numel()), dtype=torch.float32, device=parameter.device)
        return cls(torch.full_like(codes, SIGNED.index(0)), absmax, codes, absmax.clone())


@torch.no_grad()
def adamw8bit(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    states: Sequence[State8bit],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    keep_second_moments: bool = True,
) -> None:
    """One step of AdamW on all parameters, in place, their moments dequantised and quantised on the way.

    As `adamw`, but for the state: a `State8bit` for each parameter, updated in place. The parameter is updated by the
    moments before they are quantised. keep_second_moments: a second moment above 0 keeps code 1 at least, so that it
    does not vanish under a first moment that stays, which would make the next update explode; False stores the nearest
    code, as bitsandbytes and torchao do. A NaN or infinity of a gradient makes its element's parameter NaN, and the
    others of its block of 256 at the next step. Dettmers et al. 2022.
    """
    check_rule("adamw8bit", step, lr, betas, epsilon, weight_decay)
    check_tensors("adamw8bit", parameters, gradients)
    if len(states) != len(parameters):
        raise ValueError(f"adamw8bit: {len(states)} states for {len(parameters)} parameters")
    shapes = [parameter.shape for parameter in parameters]
    lengths = [(blocks(parameter.numel()),) for parameter in parameters]
    slots = [[state[slot] for state in states] for slot in range(4)]
    for name, slot in zip(State8bit._fields, slots, strict=True):
        wanted = (shapes, torch.uint8) if name.endswith("codes") else (lengths, torch.float32)
        check_state("adamw8bit", parameters, name, slot, *wanted)
    if parameters:
        _adamw8bit(
            list(parameters), list(gradients), *slots, step, lr, *betas, epsilon, weight_decay, keep_second_moments
        )
        torch.autograd.graph.increment_version(parameters)


def _reference(parameters, gradients, *rest):
    slots, rule, keep = rest[:4], rest[4:-1], rest[-1]
    for parameter, gradient, *state in zip(parameters, gradients, *slots, strict=True):
        first_codes, first_absmax, second_codes, second_absmax = state
        m = dequantize_blockwise(first_codes, first_absmax, signed=True)
        v = dequantize_blockwise(second_codes, second_absmax, signed=False)
        value, m, v = updated(parameter, gradient, m, v, *rule)
        second, absmax = quantize_blockwise(v, signed=False)
        if keep:
            second = keep_above_zero(second, v)
        new = (value, *quantize_blockwise(m, signed=True), second, absmax)
        for tensor, values in zip((parameter, *state), new, strict=True):
            tensor.copy_(values)


def _fake(*arguments):
    return None


_adamw8bit = define(
    "adamw8bit(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_codes, Tensor(c!)[] first_absmax, "
    "Tensor(d!)[] second_codes, Tensor(e!)[] second_absmax, int step, float lr, float beta1, float beta2, "
    "float epsilon, float weight_decay, bool keep_second_moments) -> ()",
    reference=_reference,
    fake=_fake,
)
