"""What an optimizer keeps of a parameter: made before the first step, looked at in parts, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_lite.optim.adamw import MOMENTS, AdamW


class SlotPart(NamedTuple):
    """A stretch of one slot of a flattened parameter, as views of the optimizer's memory."""

    values: torch.Tensor
    """fp32, or the uint8 codes of 8-bit state."""
    absmax: torch.Tensor | None
    """fp32, one for each block of 256 codes."""
    signed: bool
    """Which map the codes are of."""
    keeps_above_zero: bool
    """A value above 0 keeps code 1 at least, however small."""


def allocate_state(
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    bits: int,
    names: Sequence[str],
    cuts: Sequence[tuple[int, int]],
) -> None:
    """Make every slot of `parameter` now, as the first step would: a checkpoint can then be read into it.

    cuts: the pieces [first, last) that checkpoints hold; 8-bit state is quantised piece by piece.
    """
    if isinstance(optimizer, AdamW):
        optimizer.allocate(parameter, bits, cuts)
        return
    state = optimizer.state[parameter]
    for name in names:
        state[name] = torch.zeros_like(parameter, requires_grad=False)
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def slot_part(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, slot: str, first: int, length: int
) -> SlotPart:
    """Elements [first, first + length) of a slot of `parameter`; with 8-bit state they are one of its pieces."""
    values = optimizer.state[parameter][slot].view(-1)[first : first + length]
    if isinstance(optimizer, AdamW):
        signed = MOMENTS[slot]
        keeps = optimizer.keep_second_moments and not signed
        return SlotPart(values, optimizer.absmax(parameter, slot, first, length), signed, keeps)
    return SlotPart(values, None, True, False)


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far, as the bias correction counts them; 0 for an optimizer without one."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Set the bias correction's count, on resume."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)
