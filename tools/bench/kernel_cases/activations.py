"""SwiGLU and bias + GELU beside torch's eager chain, and Liger's SwiGLU and GEGLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Setting, applied, backward, compiled, peer

from megatron_lite.kernels.bias_gelu import bias_gelu
from megatron_lite.kernels.swiglu import swiglu


def activations(setting: Setting) -> Iterator[Case]:
    """Of [rows, 4 x hidden] outputs. SwiGLU reads two and writes one, backward three and two; GELU 2 and 3.

    Liger has no GELU of a sum: its GEGLU, of the sum and a tensor of ones, reads and writes more.
    """
    rows, width = setting.rows, 4 * setting.hidden
    whole = rows * width * setting.dtype.itemsize
    gate_up, values, dy = setting.drawn(rows, 2 * width), setting.drawn(rows, width), setting.drawn(rows, width)
    bias = setting.drawn(width)
    liger = peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction") if setting.device.type == "cuda" else None

    def torch_swiglu(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def liger_swiglu(gate_up):
        return liger.apply(*(half.contiguous() for half in gate_up.chunk(2, -1)))

    geglu, ones = peer("liger_kernel.ops.geglu", "LigerGELUMulFunction"), torch.ones_like(values)

    def liger_geglu(values, bias):
        return geglu.apply(values + bias, ones)

    def torch_gelu(values, bias):
        return F.gelu(values + bias, approximate="tanh")

    for name, ours, theirs, arguments, moved, peers in (
        ("swiglu", swiglu, torch_swiglu, [gate_up], (3, 5), {"liger": liger and liger_swiglu}),
        ("bias_gelu", bias_gelu, torch_gelu, [values, bias], (2, 3), {"liger geglu": liger and geglu and liger_geglu}),
    ):
        everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs), **peers}
        shape = arguments[0].shape
        forward = {who: applied(function, *arguments) for who, function in everyone.items() if function}
        with torch.no_grad():
            yield setting.case_of(name, shape, moved[0] * whole, forward)
        gradients = {who: backward(function, arguments, dy) for who, function in everyone.items() if function}
        yield setting.case_of(f"{name}_backward", shape, moved[1] * whole, gradients)
