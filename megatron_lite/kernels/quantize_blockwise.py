"""8-bit codes of fp32 numbers, in blocks of 256. The rule is in csrc/quantize_blockwise/quantize_blockwise.h."""

from __future__ import annotations

import torch

from megatron_lite.kernels.arguments import DTYPES
from megatron_lite.kernels.code_maps import BLOCK, SIGNED, UNSIGNED, blocks, thresholds
from megatron_lite.kernels.operators import define


def quantize_blockwise(input: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest 8-bit code of every element, and the largest magnitude of every block.

    input: any shape and strides, fp32, bf16 or fp16; read as contiguous and cut into blocks of 256. signed: which map
    of code_maps.py; without it what is below 0 gets the code of 0. Gives codes, uint8 in the input's shape, and
    absmax, fp32 [blocks]. Codes are exactly the nearest of input / absmax in fp32; a tie goes to the larger value. A
    NaN or infinity makes all of its block dequantise to NaN. No gradient. Raises TypeError for a dtype. Dettmers et
    al. 2022.
    """
    if input.dtype not in DTYPES:
        raise TypeError(f"quantize_blockwise: input is {input.dtype}; float32, bfloat16 and float16 are possible")
    return _quantize(input, signed)


def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values that 8-bit codes stand for: the map's times their block's absmax, rounded once to `dtype`.

    codes, absmax, signed: as `quantize_blockwise` gives and takes them. Gives a contiguous tensor in the shape of
    codes. No gradient. Raises TypeError for a dtype, ValueError for a shape or device that will not do.
    """
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise TypeError(
            f"dequantize_blockwise: codes are {codes.dtype} and absmax is {absmax.dtype}; uint8 and float32 are needed"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dequantize_blockwise: no result in {dtype}; float32, bfloat16 and float16 are possible")
    if absmax.shape != (blocks(codes.numel()),):
        raise ValueError(
            f"dequantize_blockwise: absmax has shape {tuple(absmax.shape)} and codes {tuple(codes.shape)}; "
            f"({blocks(codes.numel())},) is needed, one for each {BLOCK} codes"
        )
    if absmax.device != codes.device:
        raise ValueError(f"dequantize_blockwise: absmax is on {absmax.device} and codes on {codes.device}; move one")
    return _dequantize(codes, absmax, signed, dtype)


def keep_above_zero(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Unsigned codes of `values` where what is above 0 has code 1 at least, the smallest above 0."""
    return torch.where(values > 0, codes.clamp(min=1), codes)


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    padding = blocks(values.numel()) * BLOCK - values.numel()
    return torch.nn.functional.pad(values.flatten(), (0, padding)).view(-1, BLOCK)


def _quantize_reference(input, signed):
    values = _in_blocks(input.float())
    absmax = values.abs().amax(1)
    share = values / absmax[:, None]
    share = torch.where(share.isnan(), 0, share)
    steps = torch.tensor(thresholds(SIGNED if signed else UNSIGNED), device=input.device)
    codes = torch.searchsorted(steps, share, right=True).to(torch.uint8)
    return codes.flatten()[: input.numel()].view(input.shape).clone(), absmax


def _dequantize_reference(codes, absmax, signed, dtype):
    values = torch.tensor(SIGNED if signed else UNSIGNED, device=codes.device)[_in_blocks(codes).int()]
    return (values * absmax[:, None]).flatten()[: codes.numel()].view(codes.shape).to(dtype, copy=True)


def _quantize_fake(input, signed):
    codes = input.new_empty(input.shape, dtype=torch.uint8)
    return codes, input.new_empty(blocks(input.numel()), dtype=torch.float32)


def _dequantize_fake(codes, absmax, signed, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


_quantize = define(
    "quantize_blockwise(Tensor input, bool signed) -> (Tensor, Tensor)",
    reference=_quantize_reference,
    fake=_quantize_fake,
)
_dequantize = define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, bool signed, ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    fake=_dequantize_fake,
)
