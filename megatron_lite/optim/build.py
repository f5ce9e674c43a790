"""The optimizers by name, and the state they keep."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_lite.config.optimizer import OptimizerConfig


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """The optimizer over `groups`; torch's fused implementation, on a CPU too.

    AdamW after Loshchilov and Hutter 2019, with bias correction and decoupled decay.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)


def allocate_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], names: tuple[str, ...]
) -> None:
    """Make every slot of `parameters` now, as zeros, as the first step would: a checkpoint can then be
    read into it."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, requires_grad=False)
        if isinstance(optimizer, torch.optim.AdamW) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


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
