"""Rotary embedding beside the chain that LLaMA implementations write, and Liger's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_cases.case import Case, Setting, applied, backward, compiled, peer

from megatron_lite.kernels.rotary import rotary

HEAD_DIM, BATCH = 128, 4


def rotations(setting: Setting) -> Iterator[Case]:
    """Of rows / 4 positions of 4 sequences: reads and writes one tensor, forward and backward, and reads two tables."""
    positions, heads = setting.rows // BATCH, max(2, setting.hidden // HEAD_DIM)
    shape = positions, BATCH, heads, HEAD_DIM
    x, dy = setting.drawn(*shape), setting.drawn(*shape)
    angles = torch.rand(positions, 1, HEAD_DIM // 2, device=setting.device) * positions
    cosines, sines = angles.cos(), angles.sin()
    both = [torch.cat((table, table), -1).unsqueeze(2).to(setting.dtype) for table in (cosines, sines)]
    bytes = 2 * x.numel() * x.itemsize + 2 * cosines.numel() * cosines.itemsize
    liger = peer("liger_kernel.ops.rope", "LigerRopeFunction") if setting.device.type == "cuda" else None

    def ours(x):
        return rotary(x, cosines, sines)

    def theirs(x):
        first, second = x.chunk(2, -1)
        return x * both[0] + torch.cat((-second, first), -1) * both[1]

    everyone = {"ours": ours, "torch": theirs, "torch compiled": compiled(setting, theirs)}
    forward = {who: applied(function, x) for who, function in everyone.items() if function}
    gradients = {who: backward(function, [x], dy) for who, function in everyone.items() if function}
    if liger:
        # It turns queries and keys at once, [B, N, S, D] as views of [B, S, N, D]: half of the heads each.
        tables = [table[:, 0].transpose(0, 1) for table in both]
        halves, cotangents = (
            [each.transpose(0, 1).contiguous().transpose(1, 2) for each in whole.chunk(2, 2)] for whole in (x, dy)
        )
        forward["liger"] = applied(liger.apply, *halves, *tables)
        leaves = [half.requires_grad_() for half in halves]
        turned = liger.apply(*leaves, *tables)
        gradients["liger"] = lambda: torch.autograd.grad(turned, leaves, cotangents, retain_graph=True)
    with torch.no_grad():
        yield setting.case_of("rotary", shape, bytes, forward)
    yield setting.case_of("rotary_backward", shape, bytes, gradients)
