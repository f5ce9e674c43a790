"""Bias, dropout and residual beside torch's eager chain."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Setting, applied, backward, compiled

from megatron_lite.kernels.bias_dropout_add import bias_dropout_add


def dropouts(setting: Setting) -> Iterator[Case]:
    """Forward reads two tensors and writes one, backward reads one and writes one: no mask is kept."""
    x, residual, dy = (setting.drawn(setting.rows, setting.hidden) for _ in range(3))
    arguments = [x, setting.drawn(setting.hidden), residual]

    def ours(x, bias, residual):
        return bias_dropout_add(x, bias, residual, 0.1, 1234)

    def theirs(x, bias, residual):
        return residual + F.dropout(x + bias, 0.1)

    everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs)}
    with torch.no_grad():
        forward = {who: applied(function, *arguments) for who, function in everyone.items()}
        yield setting.case("bias_dropout_add", 3, **forward)
    gradients = {who: backward(function, arguments, dy) for who, function in everyone.items()}
    yield setting.case("bias_dropout_add_backward", 2, **gradients)
