"""The global gradient norm against fp64."""

import math

import pytest
import torch

from megatron_lite.optim.gradient_norm import clip_factor, sum_of_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(), (1,), (4096,), (4095, 8193), (12_000_000,)], ids=str)
def test_sum_of_squares(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = [torch.randn(size, generator=generator) * 1e-3 for size in sizes]
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    found = sum_of_squares((tensor.view(1, -1) for tensor in tensors), CPU)
    # A running fp32 sum of the largest is off by 10^-3.
    assert found.dtype == torch.float64 and float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_summed_in_more(dtype):
    """Block norms in the gradient's dtype are off by 10^-4 together."""
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = float(tensor.double().square().sum())
    assert float(sum_of_squares([tensor], CPU)) == pytest.approx(expected, rel=1e-6)


def test_what_is_not_finite_shows():
    assert math.isinf(sum_of_squares([torch.tensor([1.0, math.inf])], CPU))
    assert math.isnan(sum_of_squares([torch.ones(5000), torch.tensor([math.nan])], CPU))


def test_clip_factor():
    assert clip_factor(0.5, 1.0) == 1.0 and clip_factor(5.0, 0.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25)
