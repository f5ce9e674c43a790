"""The native kernels on a GPU: each equals its reference there, is the same when run again, and gives gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DTYPES,
    SHAPES,
    assert_as_exact_as,
    assert_equals_reference,
    assert_lists_equal_each_alone,
    assert_small_probabilities_keep_their_digits,
    cases,
    drawn,
    gradients,
    operator,
    outcome,
)
from torch.utils._pytree import tree_map_only

from megatron_lite.kernels import extension, operators
from megatron_lite.kernels.bias_gelu import bias_gelu
from megatron_lite.kernels.layer_norm import layer_norm
from megatron_lite.kernels.rms_norm import rms_norm
from megatron_lite.kernels.softmax import causal_softmax, softmax
from megatron_lite.kernels.swiglu import swiglu

# Rows longer than a block keeps in registers, and more rows than a grid has blocks.
LARGE = ((3, 40_000), (70_000, 33))


@pytest.fixture(scope="module", autouse=True)
def native(device):
    assert extension.load(device), extension.description(device)
    missing = [name for name in operators.OPERATORS if not operators.native(name, device)]
    assert not missing, f"no native code on {device}: {missing}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_equals_the_reference_and_itself(shape, dtype, device):
    for name, arguments in cases(shape, dtype):
        arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)
        # A long row's sum has more last digits than one.
        assert_equals_reference(name, arguments, digits=16 if shape in LARGE else 4)
        for first, second in zip(*(outcome(name, operator(name), arguments) for _ in range(2)), strict=True):
            assert torch.equal(first.nan_to_num(), second.nan_to_num()), f"{name} differs from run to run"


def test_lists_longer_than_a_launch_holds(device):
    assert_lists_equal_each_alone(device)


def test_small_probabilities_keep_their_digits(device):
    assert_small_probabilities_keep_their_digits(device)


def by_torch_causal_softmax(x):
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1 + x.shape[-1] - x.shape[-2])
    return x.masked_fill(hidden, -torch.inf).softmax(-1)


# What is computed, by torch, and the shapes of its arguments for [rows, length].
EXACT = {
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), "xlb"),
    "rms_norm": (rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), "xl"),
    "softmax": (softmax, lambda x: x.softmax(-1), "x"),
    "causal_softmax": (causal_softmax, by_torch_causal_softmax, "x"),
    "bias_gelu": (bias_gelu, lambda x, b: F.gelu(x + b, approximate="tanh"), "xb"),
    "exact_bias_gelu": (partial(bias_gelu, approximate="none"), lambda x, b: F.gelu(x + b), "xb"),
    "swiglu": (swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], "x"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 130), (64, 4096), (8, 20_000)], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_as_exact_as_torch(name, shape, dtype, device):
    ours, theirs, arguments = EXACT[name]
    tensors = [
        (3 * drawn(*(shape if kind == "x" else shape[-1:]), seed=seed)).to(dtype).to(device)
        for seed, kind in enumerate(arguments)
    ]
    results = gradients(ours, tensors), gradients(theirs, tensors), gradients(theirs, tensors, torch.float64)
    for o, t, e in zip(*results, strict=True):
        # 2.1: where few values of a 16-bit dtype are rounded a little later or earlier.
        assert_as_exact_as(t, o, e, factor=2.1)


def test_gradients_reach_the_leaves(device):
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((5, 4, 65), (65,), (65,))]
    causal_softmax(layer_norm(*leaves)[..., :4], 0.3).square().sum().backward()
    expected = [leaf.detach().double().requires_grad_() for leaf in leaves]
    normal = torch.nn.functional.layer_norm(expected[0], (65,), *expected[1:])
    hidden = torch.ones(4, 4, dtype=torch.bool, device=device).triu(1)
    (normal[..., :4] * 0.3).masked_fill(hidden, -torch.inf).softmax(-1).square().sum().backward()
    for ours, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
