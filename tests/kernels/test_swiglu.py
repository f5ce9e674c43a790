"""SwiGLU: as exact as torch's, in every dtype and instruction set, and sane at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, SHAPES, assert_as_exact_as, drawn, gradients, strided

from megatron_lite.kernels.swiglu import swiglu

# Among fewer values a peer may be exact by chance; those shapes are compared with the reference in test_operators.py.
ENOUGH = [shape for shape in SHAPES if math.prod(shape) not in range(1, 100)]


def by_torch(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("shape", [*ENOUGH, (2, 2100), (3, 0)], ids=str)
def test_as_exact_as_torch(shape, scale, dtype, instruction_set):
    x = (drawn(*shape[:-1], 2 * shape[-1]) * scale).to(dtype)
    ours, theirs, exact = gradients(swiglu, [x]), gradients(by_torch, [x]), gradients(by_torch, [x], torch.float64)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert_as_exact_as(t, o, e)


def test_each_value_is_exact_for_itself(instruction_set):
    """Small results beside large ones keep their digits: the exponential is held to its own size everywhere."""
    gate = torch.linspace(-87, 88, 40001)
    output = swiglu(torch.cat((gate, torch.ones_like(gate))))
    torch.testing.assert_close(output.double(), F.silu(gate.double()), rtol=5e-7, atol=0)


@given(st.data())
def test_any_shape_and_strides(data):
    dims = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dims[-1] = 2 * data.draw(st.integers(0, 100))
    x = strided(data, dims)
    output = swiglu(x)
    assert output.is_contiguous()
    torch.testing.assert_close(output, by_torch(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_tiny_gates(dtype, instruction_set):
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-largest, -1000, 1000, largest, 1e-7, -1e-7, math.inf], dtype=dtype)
    x = torch.stack((gate, torch.ones_like(gate)), -1).requires_grad_()
    output = swiglu(x)
    output.sum().backward()
    torch.testing.assert_close(output, by_torch(x), rtol=3e-7, atol=0)
    assert x.grad[:4].isfinite().all() and x.grad[:4, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_where_it_came_in(dtype, instruction_set):
    x = drawn(3, 140, dtype=dtype)
    x[1, 66] = x[1, 70 + 69] = math.nan
    x[2, 5] = -math.inf
    assert swiglu(x).isnan().nonzero().tolist() == [[1, 66], [1, 69], [2, 5]]


def test_refusals_give_the_numbers():
    with pytest.raises(ValueError, match=r"input has shape \(2, 5\); the last dim must be even"):
        swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"input has shape \(\)"):
        swiglu(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"input is torch.float64; float32, bfloat16 and float16"):
        swiglu(torch.zeros(2, 4).double())
    with pytest.raises(RuntimeError, match="gradient has 3 elements where 4 belong"):
        torch.ops.megatron_lite.swiglu_backward(torch.zeros(3), torch.zeros(2, 4))
