"""AdamW with 32-bit and with 8-bit state, of 25 million parameters in tensors of several sizes, beside the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from kernel_cases.case import Case, Contender, Setting, apex, peer

from megatron_lite.kernels.adamw import adamw
from megatron_lite.kernels.adamw8bit import State8bit, adamw8bit

_RULE = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def optimizers(setting: Setting) -> Iterator[Case]:
    """One step. Bytes a parameter: its own, its gradient's and its state's, each read, all but the gradient written."""
    times = 8 if setting.device.type == "cuda" else 1
    sizes = [24 * 2**20 // 16] * 15 * times + [2**20] * times + [1000] * 16
    width = setting.dtype.itemsize
    elements = sum(sizes)

    yield setting.case_of(
        "adamw",
        (elements,),
        elements * (3 * width + 16),
        {
            "ours": _ours(setting, sizes),
            "torch": _stepper(torch.optim.AdamW, setting, sizes, fused=True),
            "deepspeed": _deepspeed(setting, sizes),
            "bitsandbytes": _peer("AdamW32bit", setting, sizes),
            "apex": _apex(setting, sizes),
        },
    )
    yield setting.case_of(
        "adamw8bit",
        (elements,),
        int(elements * (3 * width + 4 + 16 / 256)),
        {"ours": _ours_8bit(setting, sizes), "bitsandbytes": _peer("AdamW8bit", setting, sizes)},
    )


def _tensors(setting: Setting, sizes: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [setting.drawn(size) for size in sizes], [setting.drawn(size) for size in sizes]


def _ours(setting: Setting, sizes: Sequence[int]) -> Contender:
    parameters, gradients = _tensors(setting, sizes)
    first, second = ([torch.zeros(size, device=setting.device) for size in sizes] for _ in range(2))
    steps = count(1)
    return lambda: adamw(parameters, gradients, first, second, step=next(steps), **_RULE)


def _ours_8bit(setting: Setting, sizes: Sequence[int]) -> Contender:
    parameters, gradients = _tensors(setting, sizes)
    states = [State8bit.zeros(parameter) for parameter in parameters]
    steps = count(1)
    return lambda: adamw8bit(parameters, gradients, states, step=next(steps), **_RULE)


def _stepper(optimizer: Callable[..., torch.optim.Optimizer], setting: Setting, sizes: Sequence[int], **options):
    """The step of an optimizer class, its parameters and gradients drawn; torch keeps state in their dtype."""
    parameters, gradients = _tensors(setting, sizes)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_().grad = gradient
    return optimizer(parameters, **_RULE, **options).step


def _peer(name: str, setting: Setting, sizes: Sequence[int]) -> Contender | None:
    found = peer("bitsandbytes.optim", name)
    # On a CPU it has blocks of 8 bits alone.
    if found is None or (setting.device.type == "cpu" and "8bit" not in name):
        return None
    return _stepper(found, setting, sizes)


def _apex(setting: Setting, sizes: Sequence[int]) -> Contender | None:
    found = apex(setting, "optimizers", "FusedAdam")
    return found and _stepper(found, setting, sizes, adam_w_mode=True)


def _deepspeed(setting: Setting, sizes: Sequence[int]) -> Contender | None:
    """DeepSpeed's own for this device, compiled at its first use; None where it cannot be, or not in this dtype."""
    if setting.dtype == torch.float16 or (setting.device.type == "cpu" and setting.dtype != torch.float32):
        return None
    found = peer("deepspeed.ops.adam", "FusedAdam" if setting.device.type == "cuda" else "DeepSpeedCPUAdam")
    try:
        return found and _stepper(
            found, setting, sizes, **({} if setting.device.type == "cuda" else {"adamw_mode": True})
        )
    except Exception as error:  # a compiler that fails raises whatever it likes
        print(f"deepspeed's Adam is left out: {error}")
        return None
