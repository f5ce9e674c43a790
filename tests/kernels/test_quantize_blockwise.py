"""8-bit codes: the shipped maps to the bit, the nearest code of every value, sane at the edges."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import CODE_MAPS, DTYPES, drawn, nearest_codes

from megatron_lite.kernels.code_maps import SIGNED, UNSIGNED, header
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from megatron_lite.kernels.sources import CSRC


def codes_of(shares, signed):
    """The codes of values in [-1, 1] as they are: each block's absmax is made 1 by its last element."""
    rows = torch.nn.functional.pad(shares, (0, -shares.numel() % 255)).view(-1, 255)
    codes, absmax = quantize_blockwise(torch.nn.functional.pad(rows, (0, 1), value=1.0), signed=signed)
    assert (absmax == 1).all()
    return codes[:, :255].flatten()[: shares.numel()].numpy()


def test_the_maps_are_those_of_the_format():
    digests = [hashlib.sha256(struct.pack("<256f", *values)).hexdigest() for values in (SIGNED, UNSIGNED)]
    assert digests == [
        "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
        "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
    ]
    assert (CSRC / "quantize_blockwise" / "code_maps.h").read_text(encoding="utf-8") == header()


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_in_every_decade(signed, instruction_set):
    lowest, one = (struct.unpack("<i", struct.pack("<f", value))[0] for value in (2.0**-26, 1.0))
    shares = torch.arange(lowest, one + 1, 97, dtype=torch.int32).view(torch.float32)
    for sign in (1, -1) if signed else (1,):
        assert np.array_equal(codes_of(sign * shares, signed), nearest_codes(sign * shares, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_around_every_middle_decade_and_code(signed, instruction_set):
    values = torch.tensor(CODE_MAPS[signed], dtype=torch.float64)
    places = torch.cat([values, (values[1:] + values[:-1]) / 2, 10.0 ** -torch.arange(8.0, dtype=torch.float64)])
    bits = places[places != 0].float().view(torch.int32)
    shares = (bits[:, None] + torch.arange(-4, 5, dtype=torch.int32)).flatten().view(torch.float32)
    shares = shares[shares.abs() <= 1]
    assert np.array_equal(codes_of(shares, signed), nearest_codes(shares, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_a_share_is_rounded_as_by_division_whatever_the_absmax(signed, instruction_set):
    values = np.array(CODE_MAPS[signed])
    middles = torch.from_numpy((values[1:] + values[:-1]) / 2)[None]
    exponents = torch.arange(-140.0, 127.0, dtype=torch.float64)[:, None]
    absmax = ((1 + torch.rand(267, 1, generator=torch.Generator().manual_seed(1))).double() * 2**exponents).float()
    shares = torch.cat([(absmax.double() * middles).float(), absmax], 1)  # products next to a middle, on either side
    codes, largest = quantize_blockwise(shares, signed=signed)
    assert torch.equal(largest, absmax.flatten())
    assert np.array_equal(codes.numpy(), nearest_codes(shares / absmax, signed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [True, False])
def test_what_codes_stand_for_is_kept(signed, dtype, instruction_set):
    codes = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(torch.uint8).repeat(3)[:700]
    absmax = torch.tensor([1.0, 0.375, 3e-3])
    values = dequantize_blockwise(codes, absmax, signed=signed, dtype=dtype)
    exact = torch.tensor(CODE_MAPS[signed])[codes.int()] * absmax.repeat_interleave(256)[:700]
    assert torch.equal(values, exact.to(dtype))
    if dtype == torch.float32:
        again, largest = quantize_blockwise(values[:512], signed=signed)
        assert torch.equal(again, codes[:512]) and torch.equal(largest, absmax[:2])


@given(st.data())
def test_the_error_is_half_a_gap_in_any_shape_and_strides(data):
    dims = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
    dtype, signed = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    x = drawn(*dims, 2, dtype=dtype)[..., 0].transpose(0, -1)
    x = x if signed else x.abs()
    codes, absmax = quantize_blockwise(x, signed=signed)
    values = dequantize_blockwise(codes, absmax, signed=signed)
    assert codes.shape == values.shape == x.shape and absmax.shape == (-(-x.numel() // 256),)
    error = (values - x.float()).flatten().abs()

    bound = 0.00704 * absmax.repeat_interleave(256)[: x.numel()]  # the widest gap of the signed map is 0.01406
    assert (error <= bound).all()


def test_tiny_blocks_are_not_flushed(instruction_set):
    x = torch.arange(1, 257) * 1e-43
    codes, absmax = quantize_blockwise(x, signed=False)
    assert absmax.item() == x[-1].item() > 0
    assert torch.equal(codes.flatten(), torch.from_numpy(nearest_codes(x / absmax, False)).to(torch.uint8))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_block(bad, signed, instruction_set):
    x = drawn(1000).abs()
    x[300] = bad
    values = dequantize_blockwise(*quantize_blockwise(x, signed=signed), signed=signed)
    assert values[256:512].isnan().all()
    assert values[:256].isfinite().all() and values[512:].isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_and_what_an_unsigned_map_lacks(signed, instruction_set):
    codes, absmax = quantize_blockwise(torch.tensor([0.0, -0.0]).repeat(400), signed=signed)
    assert (absmax == 0).all() and (codes == CODE_MAPS[signed].index(0)).all()
    assert quantize_blockwise(torch.tensor([-2.0, 1.0]), signed=False)[0].tolist()[0] == 0


def test_refusals_give_the_numbers():
    codes, absmax = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(TypeError, match=r"input is torch.float64"):
        quantize_blockwise(torch.zeros(2, dtype=torch.float64), signed=True)
    with pytest.raises(TypeError, match=r"codes are torch.int8 and absmax is torch.float32"):
        dequantize_blockwise(codes.char(), absmax, signed=True)
    with pytest.raises(TypeError, match=r"no result in torch.float64"):
        dequantize_blockwise(codes, absmax, signed=True, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"absmax has shape \(3,\) and codes \(300,\); \(2,\) is needed"):
        dequantize_blockwise(codes, torch.zeros(3), signed=True)
    with pytest.raises(ValueError, match=r"absmax is on meta and codes on cpu"):
        dequantize_blockwise(codes, absmax.to("meta"), signed=True)
    with pytest.raises(RuntimeError, match=r"absmax has 3 elements where 2 belong"):
        torch.ops.megatron_lite.dequantize_blockwise(codes, torch.zeros(3), True, torch.float32)
    with pytest.raises(RuntimeError, match=r"has no gradient"):
        quantize_blockwise(torch.ones(3, requires_grad=True), signed=True)[1].sum().backward()
