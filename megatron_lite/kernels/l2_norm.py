"""The L2 norm of a list of tensors. How it is summed is in csrc/l2_norm/l2_norm.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lite.kernels.arguments import DTYPES
from megatron_lite.kernels.operators import define


def l2_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """sqrt(sum of squares) over all elements of all tensors, as an fp32 tensor of no dim.

    tensors: at least one; any shapes and strides, fp32, bf16 and fp16 mixed, on one device. The same bit for bit
    whatever the number of threads. A NaN makes it NaN. An infinity makes it infinite, and so does a block of 2,048
    elements (on a GPU: of 16 bytes) whose squares sum to more than fp32 holds, 3.4e38: one element of 1.8e19, or 2,048
    of 4.1e17. It has no gradient. Raises TypeError for a dtype, ValueError for an empty list or several devices.
    """
    if not tensors:
        raise ValueError("l2_norm: no tensors; at least one is needed (the norm of nothing has no device)")
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"l2_norm: tensor {index} is {tensor.dtype}; float32, bfloat16 and float16 are possible")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"l2_norm: tensor {index} is on {tensor.device} and tensor 0 on {tensors[0].device}; "
                "take the norm of each device's and combine them"
            )
    return _l2_norm(list(tensors))


def _reference(tensors):
    squares = [tensor.float().square().sum(dtype=torch.float64) for tensor in tensors]
    return torch.stack(squares).sum().sqrt().float()


def _fake(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


_l2_norm = define("l2_norm(Tensor[] tensors) -> Tensor", reference=_reference, fake=_fake)
