"""What every operator owes torch: schema, fake, gradient registration, compilation; and its reference."""

import pytest
import torch
from kernel_cases import DTYPES, SHAPES, assert_equals_reference, cases, drawn, operator, outcome, updates
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_lite.kernels.layer_norm import layer_norm
from megatron_lite.kernels.operators import OPERATORS, native
from megatron_lite.kernels.sources import CSRC, OPERATIONS

EVERY = [
    pytest.param(name, arguments, id=f"{i}-{name}") for i, (name, arguments) in enumerate(cases((3, 33), torch.float32))
]


DIFFERENTIABLE = {
    name
    for name in OPERATORS
    if f"{name}_backward" in OPERATORS or f"{name.removeprefix('residual_')}_backward" in OPERATORS or name == "rotary"
}


def differentiable(tensor):
    return tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor


def test_every_operator_has_a_case_a_file_and_native_code():
    assert {case.values[0] for case in EVERY} == set(OPERATORS)
    assert {name for name in OPERATORS if not native(name, "cpu")} == set()
    folders = {path.name for path in CSRC.iterdir() if path.is_dir()} - {"base", "host"}
    assert folders == set(OPERATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_code_equals_the_reference(shape, dtype, instruction_set):
    for name, arguments in cases(shape, dtype):
        assert_equals_reference(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_torch_checks_pass(name, arguments):
    # What has a gradient is checked with it; the others refuse one.
    if name in DIFFERENTIABLE:
        arguments = tree_map_only(torch.Tensor, differentiable, arguments)
    torch.library.opcheck(operator(name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_meta_tensors_give_shapes_and_dtypes(name, arguments):
    real = outcome(name, operator(name), arguments)
    meta = outcome(name, operator(name), tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))
    for one, other in zip(real, meta, strict=True):
        assert other.is_meta and (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_inputs_are_left_alone(name, arguments):
    after = tree_map_only(torch.Tensor, torch.Tensor.clone, arguments)
    operator(name)(*after)
    for place, (before, now) in enumerate(zip(arguments, after, strict=True)):
        if place not in updates(name):
            for one, other in zip(tree_leaves(before), tree_leaves(now), strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_every_operator_compiles_without_a_graph_break(name, arguments):
    torch.compiler.reset()
    compiled = torch.compile(operator(name), fullgraph=True, backend="aot_eager")
    for one, other in zip(outcome(name, compiled, arguments), outcome(name, operator(name), arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "arguments"), [case for case in EVERY if not updates(case.values[0])])
def test_strides_change_no_bit(name, arguments):
    def spread(tensor):
        return tensor.unsqueeze(-1).repeat_interleave(2, -1)[..., 0] if tensor.dim() else tensor

    strided, plain = (tree_map_only(torch.Tensor, each, arguments) for each in (spread, torch.Tensor.contiguous))
    assert any(not t.is_contiguous() for t in tree_leaves(strided) if isinstance(t, torch.Tensor))
    results = [tree_leaves(operator(name)(*given)) for given in (strided, plain)]
    for one, other in zip(*results, strict=True):
        assert one.is_contiguous() and torch.equal(one, other)


def test_a_second_derivative_is_refused():
    x, weight, bias = (t.requires_grad_() for t in (drawn(2, 5), drawn(5), drawn(5)))
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward has no gradient"):
        dx.sum().backward()


def test_compiles_without_a_graph_break():
    def block(x, weight, bias):
        return layer_norm(torch.relu(x), weight, bias) * 2

    tensors = [drawn(4, 9), drawn(9, seed=1), drawn(9, seed=2)]
    plain, compiled = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    output = torch.compile(block, fullgraph=True, backend="aot_eager")(*compiled)
    expected = block(*plain)
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, compiled, strict=True))
