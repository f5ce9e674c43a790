"""The optimizers by name."""

from __future__ import annotations

import torch

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.kernels import extension
from megatron_lite.optim.adamw import AdamW


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """The optimizer over `groups`, which say by "bits" where adamw8bit keeps 8-bit state.

    Where there are no native kernels, torch's fused AdamW is faster than their reference and keeps the same state.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)
    rule = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if is_torchs_own(config, _device(groups)):
        return torch.optim.AdamW(groups, **rule, fused=True)
    return AdamW(groups, **rule, keep_second_moments=not config.adam8bit_nearest_codes)


def is_torchs_own(config: OptimizerConfig, device: str) -> bool:
    """Whether the optimizer on such a device is one of torch's."""
    return config.optimizer == "sgd" or (config.optimizer == "adamw" and not extension.load(device))


def _device(groups: list[dict[str, object]]) -> str:
    return next(parameter.device.type for group in groups for parameter in group["params"])
