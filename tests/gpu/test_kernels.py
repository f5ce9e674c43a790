"""The native kernels on a GPU: each equals its reference there, is the same when run again, and gives gradients."""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    SHAPES,
    assert_equals_reference,
    assert_lists_equal_each_alone,
    cases,
    operator,
    outcome,
)
from torch.utils._pytree import tree_map_only

from megatron_lite.kernels import extension, operators
from megatron_lite.kernels.layer_norm import layer_norm
from megatron_lite.kernels.softmax import causal_softmax

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


def test_gradients_reach_the_leaves(device):
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((5, 4, 65), (65,), (65,))]
    causal_softmax(layer_norm(*leaves)[..., :4], 0.3).square().sum().backward()
    expected = [leaf.detach().double().requires_grad_() for leaf in leaves]
    normal = torch.nn.functional.layer_norm(expected[0], (65,), *expected[1:])
    hidden = torch.ones(4, 4, dtype=torch.bool, device=device).triu(1)
    (normal[..., :4] * 0.3).masked_fill(hidden, -torch.inf).softmax(-1).square().sum().backward()
    for ours, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
