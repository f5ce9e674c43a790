"""Declares an operation to torch: schema, reference, fake and gradient; native code joins by the same name.

The reference is every device's default. The first call that reaches it finds or builds the native code of its
device (see extension.py), which the dispatcher prefers from then on: a later call costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.kernels import extension

_library = torch.library.Library("megatron_lite", "FRAGMENT")
OPERATORS: dict[str, Callable[..., Any]] = {}
"""The reference of every declared operation, by name."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """The operator `megatron_lite::name` of a schema such as "name(Tensor input) -> Tensor".

    reference: the same in plain torch; its outputs are contiguous, new tensors.
    fake: shapes and dtypes alone, for meta tensors and torch.compile.
    backward, setup_context: as `torch.library.register_autograd` takes them. Without them a gradient is refused,
        except by what updates its arguments in place: that is called under torch.no_grad().
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.megatron_lite, name).default

    def first_call(*arguments):
        device = _device(arguments)
        if extension.load(device) and native(name, device):
            return operator(*arguments)
        return reference(*arguments)

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f"megatron_lite::{name} has no gradient (a norm's, softmax's or loss's is its own kernel: a second "
            "derivative is not to be had). Run under torch.no_grad(), or use plain torch where you need one"
        )

    _library.impl(name, first_call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatron_lite::{name}", fake, lib=_library)
    if not operator._schema.is_mutable:
        torch.library.register_autograd(
            f"megatron_lite::{name}", backward or refuse, setup_context=setup_context, lib=_library
        )
    OPERATORS[name] = reference
    return operator


def _device(arguments: tuple[Any, ...]) -> str:
    for argument in arguments:
        for tensor in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(tensor, torch.Tensor):
                return tensor.device.type
    return "cpu"


def native(name: str, device: str) -> bool:
    """Whether an operation has native code for a device type ("cpu", "cuda") in this process."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_lite::{name}", device.upper())
