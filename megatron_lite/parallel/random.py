"""Dropout without stored random state: every mask is arithmetic.

A micro-batch has a seed made of (run seed, step, global micro-batch); a dropout site adds its layer,
its name and, in attention, whose heads differ between tensor ranks, the rank. A mask is a function of its seed and
of the elements' places, but for that within torch's attention kernels: those draw from the device's default
generator, which is seeded anew each time. So recomputed activations see the same masks, and a resumed run goes on
with the masks it would have had, with nothing saved. Whoever else draws from the default generator during a forward
pass shares its state.
"""

from __future__ import annotations

import torch

from megatron_lite.kernels.bias_dropout_add import bias_dropout_add

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers, in order (splitmix64's finaliser over a running state)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """The dropout seed of one global micro-batch (numbered over all data ranks) of a step."""
    return mix(seed, step, micro_batch)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default generator of `device`, which torch's attention draws from.

    The CPU's generator takes the low 32 bits, of which `mix` makes as good a hash as of all 64.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        generators = getattr(torch, device.type).default_generators
        generators[device.index or 0].manual_seed(seed)


def dropout(tensor: torch.Tensor, probability: float, seed: int | None) -> torch.Tensor:
    """`tensor` with elements zeroed with `probability` and the rest scaled up; whole if `seed` is None."""
    if seed is None or probability == 0.0:
        return tensor
    return bias_dropout_add(tensor, None, None, probability, seed)
