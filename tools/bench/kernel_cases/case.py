"""What a case of the kernel benchmark is, and how contenders are made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lite.errors import KernelError
from megatron_lite.model.apex import nvidia_apex_norms

Contender = Callable[[], object]


@dataclass
class Case:
    """One thing to time: the bytes it moves through memory at least, and who does it; "ours" comes first."""

    operation: str
    size: str
    bytes: int
    contenders: dict[str, Contender]


@dataclass(frozen=True)
class Setting:
    """What every case of a run shares."""

    rows: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool

    def drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def case(self, operation: str, tensors: int, **contenders: Contender | None) -> Case:
        """A case that moves so many tensors of rows x hidden; contenders that are None are not installed."""
        bytes = tensors * self.rows * self.hidden * self.dtype.itemsize
        named = {name.replace("_", " "): run for name, run in contenders.items()}
        return self.case_of(operation, (self.rows, self.hidden), bytes, named)

    def case_of(
        self, operation: str, shape: Sequence[int], bytes: int, contenders: dict[str, Contender | None]
    ) -> Case:
        """A case of some other shape, that moves so many bytes."""
        size = f"{list(shape)} {str(self.dtype).removeprefix('torch.')}"
        return Case(operation, size, bytes, {name: run for name, run in contenders.items() if run})


def peer(module: str, name: str) -> Any:
    """Something of another project, or None where that is not installed or does not run."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def apex(setting: Setting, module: str, name: str) -> Any:
    """Something of NVIDIA's apex, or None where that is not installed for this device."""
    try:
        nvidia_apex_norms(setting.device.type)
    except KernelError:
        return None
    return peer(f"apex.{module}", name)


def compiled(setting: Setting, function: Callable[..., Any]) -> Callable[..., Any] | None:
    return torch.compile(function, dynamic=False) if setting.compiled else None


def applied(function: Callable[..., Any] | None, *arguments: Any) -> Contender | None:
    return (lambda: function(*arguments)) if function else None


def backward(
    function: Callable[..., Any] | None, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> Contender | None:
    """The gradient alone: the forward pass runs once, now."""
    if function is None:
        return None
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    if output.grad_fn is None:
        return None
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)
