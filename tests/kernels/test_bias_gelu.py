"""GELU with a bias: as exact as torch's, in every dtype and instruction set, and sane at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, SHAPES, assert_as_exact_as, assert_threads_change_nothing, drawn, gradients, strided

from megatron_lite.kernels.bias_gelu import bias_gelu

# Among fewer values a peer may be exact by chance; those shapes are compared with the reference in test_operators.py.
ENOUGH = [shape for shape in SHAPES if math.prod(shape) not in range(1, 100)]
FORMULAS = pytest.mark.parametrize("approximate", ["tanh", "none"])


@FORMULAS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ENOUGH, (2, 2100), (3, 0)], ids=str)
def test_as_exact_as_torch(shape, dtype, approximate, instruction_set):
    def ours(x, bias):
        return bias_gelu(x, bias, approximate=approximate)

    def theirs(x, bias):
        return F.gelu(x + bias, approximate=approximate)

    tensors = (drawn(*shape) * 3).to(dtype), drawn(shape[-1], dtype=dtype, seed=1)
    results = gradients(ours, tensors), gradients(theirs, tensors), gradients(theirs, tensors, torch.float64)
    for o, t, e in zip(*results, strict=True):
        assert_as_exact_as(t, o, e)


@FORMULAS
def test_without_a_bias(approximate):
    x = drawn(7, 130)
    ours = gradients(lambda x: bias_gelu(x, approximate=approximate), [x])
    with_zeros = gradients(lambda x: bias_gelu(x, torch.zeros(130), approximate=approximate), [x])
    assert all(torch.equal(a, b) for a, b in zip(ours, with_zeros, strict=True))


@FORMULAS
def test_values_far_to_the_left_keep_their_digits(approximate, instruction_set):
    z = torch.linspace(-6, 0, 20001)
    if approximate == "none":
        exact = z.double() * torch.special.ndtr(z.double())
    else:
        u = math.sqrt(2 / math.pi) * (z.double() + 0.044715 * z.double() ** 3)
        exact = z.double() * torch.sigmoid(2 * u)
    # exp(u) is as inexact as u is long: |u| is 25 at most here, and each of its roundings counts that often.
    torch.testing.assert_close(bias_gelu(z, approximate=approximate).double(), exact, rtol=4e-6, atol=0)


@given(st.data())
def test_any_shape_and_strides(data):
    dims = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dims[-1] = data.draw(st.integers(0, 200))
    x = strided(data, dims)
    bias = drawn(x.shape[-1], 3, seed=2)[:, 1]
    output = bias_gelu(x, bias)
    assert output.is_contiguous()
    torch.testing.assert_close(output, F.gelu(x + bias, approximate="tanh"), rtol=1e-6, atol=1e-6)


@FORMULAS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends(dtype, approximate, instruction_set):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -100, 100, largest, math.inf, 0], dtype=dtype, requires_grad=True)
    output = bias_gelu(x, approximate=approximate)
    output.sum().backward()
    assert output.tolist() == [0, 0, 100, largest, math.inf, 0]
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0.5]
    infinite = torch.tensor([-math.inf], dtype=dtype, requires_grad=True)
    output = bias_gelu(infinite, approximate=approximate)
    output.backward()
    assert output.isnan() and infinite.grad == 0


@FORMULAS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_where_it_came_in(dtype, approximate, instruction_set):
    x, bias = drawn(3, 140, dtype=dtype), drawn(140, dtype=dtype, seed=1)
    x[1, 66] = x[2, 139] = math.nan
    x.requires_grad_()
    bias.requires_grad_()
    output = bias_gelu(x, bias, approximate=approximate)
    output.sum().backward()
    for values in (output, x.grad):
        assert values.isnan().nonzero().tolist() == [[1, 66], [2, 139]]
    assert bias.grad.isnan().nonzero().flatten().tolist() == [66, 139]


def test_the_number_of_threads_changes_nothing():
    tensors = drawn(1000, 130, dtype=torch.bfloat16), drawn(130, dtype=torch.bfloat16, seed=1)
    assert_threads_change_nothing(lambda: gradients(bias_gelu, tensors))


def test_refusals_give_the_numbers():
    x, bias = torch.zeros(2, 6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\) and input \(2, 6\); \(6,\) is needed"):
        bias_gelu(x, torch.zeros(5))
    with pytest.raises(TypeError, match=r"input is torch.float64; float32, bfloat16 and float16"):
        bias_gelu(x.double(), bias.double())
    with pytest.raises(TypeError, match=r"bias is torch.bfloat16 and input is torch.float32"):
        bias_gelu(x, bias.bfloat16())
    with pytest.raises(ValueError, match="bias is on meta and input is on cpu"):
        bias_gelu(x, bias.to("meta"))
    with pytest.raises(ValueError, match=r"approximate is 'erf'; \"tanh\" and \"none\""):
        bias_gelu(x, bias, approximate="erf")
    with pytest.raises(RuntimeError, match="bias has 5 elements where 6 belong"):
        torch.ops.megatron_lite.bias_gelu(x, torch.zeros(5), True)
