"""RMS norm: as exact as torch's, in every dtype and instruction set, and sane at the edges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    SHAPES,
    assert_as_exact_as,
    assert_equals_reference,
    assert_threads_change_nothing,
    drawn,
    gradients,
    strided,
)

from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm


def arguments(shape, dtype, offset=0.0):
    return [(drawn(*shape, seed=i) + offset).to(dtype) for i in range(2)] + [drawn(shape[-1], dtype=dtype, seed=2)]


def by_torch(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, instruction_set):
    x, _, weight = arguments(shape, dtype)
    ours = gradients(rms_norm, (x, weight))
    theirs = gradients(by_torch, (x, weight))
    exact = gradients(by_torch, (x, weight), torch.float64)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert_as_exact_as(t, o, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_is_added_before(shape, dtype, instruction_set):
    def fused(x, residual, weight):
        return residual_rms_norm(x, residual, weight)

    def by_torch_after(total, weight):
        return by_torch(total, weight), total * 1

    x, residual, weight = arguments(shape, dtype)
    output, total, dx, dresidual, dweight = gradients(fused, (x, residual, weight))
    assert torch.equal(total, x + residual)
    theirs = gradients(by_torch_after, (total, weight))
    exact = gradients(by_torch_after, (total, weight), torch.float64)
    for o, t, e in zip([output, total, dx, dweight], theirs, exact, strict=True):
        assert_as_exact_as(t, o, e)
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_sum_of_any_two_numbers_rounds_as_torch_rounds(dtype, instruction_set):
    """Every pattern of 16 bits: denormals, ties, infinities and NaN are widened and rounded right."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    others = [x, x.flip(0), x.roll(1), x.roll(12345), torch.zeros_like(x), torch.full_like(x, 1.0)]
    for residual in others:
        _, total = residual_rms_norm(x, residual, torch.ones_like(x))
        assert torch.equal(total.nan_to_num(7), (x + residual).nan_to_num(7))
        assert torch.equal(total.isnan(), (x + residual).isnan())


def test_only_the_sum_is_used():
    x, residual, weight = (t.requires_grad_() for t in arguments((3, 7), torch.float32))
    residual_rms_norm(x, residual, weight)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and weight.grad is None


@given(st.data())
def test_any_shape_and_strides(data):
    dims = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dims[-1] = data.draw(st.integers(1, 200))
    x = strided(data, dims)
    weight = drawn(x.shape[-1], 3, seed=2)[:, 1]
    output = rms_norm(x, weight)
    assert output.is_contiguous()
    torch.testing.assert_close(output, by_torch(x, weight), rtol=1e-4, atol=2e-5)


def test_tiny_values_are_not_flushed(instruction_set):
    x = (torch.arange(-50, 51) * 1e-43)[None]
    weight = torch.full((101,), 1e30)
    exact = F.rms_norm(x.double(), (101,), weight.double(), 1e-30)
    output = rms_norm(x, weight, 1e-30)
    assert output.count_nonzero() == 100
    torch.testing.assert_close(output.double(), exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(bad, dtype, instruction_set):
    x = drawn(5, 70, dtype=dtype)
    x[2, 66] = bad
    output = rms_norm(x, torch.ones(70, dtype=dtype))
    assert output[2].isnan().all() and output[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_of_squares_that_overflows_shows(dtype, instruction_set):
    """With r = 0 the output and the gradient would be 0."""
    x, weight = drawn(3, 70, dtype=dtype), torch.ones(70, dtype=dtype)
    x[1] *= 1e30
    assert_equals_reference("rms_norm", (x, weight, 1e-5, False))
    output, dx, _ = gradients(rms_norm, (x, weight))
    for t in (output, dx):
        assert t[1].isnan().all() and t[[0, 2]].isfinite().all()


def test_the_number_of_threads_changes_nothing():
    tensors = arguments((1000, 130), torch.bfloat16)
    assert_threads_change_nothing(lambda: gradients(residual_rms_norm, tensors))


def test_refusals_give_the_numbers():
    x, weight = torch.zeros(2, 6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\) and input \(2, 6\); \(6,\) is needed"):
        rms_norm(x, torch.zeros(5))
    with pytest.raises(TypeError, match=r"input is torch.float64; float32, bfloat16 and float16"):
        rms_norm(x.double(), weight.double())
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16 and input is torch.float32"):
        rms_norm(x, weight.bfloat16())
    with pytest.raises(ValueError, match="weight is on meta and input is on cpu"):
        rms_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"residual has shape \(6,\) and input \(2, 6\)"):
        residual_rms_norm(x, weight, weight)
    with pytest.raises(ValueError, match="no dim"):
        rms_norm(torch.tensor(1.0), weight)
    with pytest.raises(RuntimeError, match="weight has 5 elements where 6 belong"):
        torch.ops.megatron_lite.rms_norm(x, torch.zeros(5), 1e-5, False)
