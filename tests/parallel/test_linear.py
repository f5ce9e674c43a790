"""Column- and row-parallel layers: together a dense pair; replicas; what DeepSpeed counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks

from megatron_lite.parallel.linear import ColumnParallelLinear, RowParallelLinear, TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

SIZE = 4


def _global(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)))


def _check_pair():
    mesh = ProcessMesh.create(MeshShape(tensor=SIZE))
    weights = {"up.weight": _global("a", 24, 8), "up.bias": _global("ab", 24)}
    weights |= {"down.weight": _global("abc", 8, 24), "down.bias": _global("abcd", 8)}
    hidden, cotangent = _global("hidden", 16, 2, 8), _global("cotangent", 16, 2, 8)

    dense = {name: value.clone().requires_grad_() for name, value in weights.items()}
    dense_input = hidden.clone().requires_grad_()
    inner = F.linear(dense_input, dense["up.weight"], dense["up.bias"]).relu()
    expected = F.linear(inner, dense["down.weight"], dense["down.bias"])
    expected.backward(cotangent)

    for sequence_parallel in (False, True):
        axis = TensorAxis(mesh, sequence_parallel)
        layers = torch.nn.ModuleDict(
            {
                "up": ColumnParallelLinear(8, 24, mesh, bias=True),
                "down": RowParallelLinear(24, 8, mesh, bias=True),
            }
        )
        for name, parameter in layers.named_parameters():
            parameter.data.copy_(parameter.mesh_layout.cut(weights[name]))
        leaf = axis.part_of_sequence(hidden).clone().requires_grad_()
        output, bias = layers["down"](layers["up"](axis.enter(leaf)).relu(), axis)
        output = output + bias
        assert torch.allclose(output, axis.part_of_sequence(expected.detach()), atol=1e-5)
        output.backward(axis.part_of_sequence(cotangent))
        assert torch.allclose(leaf.grad, axis.part_of_sequence(dense_input.grad), atol=1e-5)
        for name, parameter in layers.named_parameters():
            assert torch.allclose(parameter.grad, parameter.mesh_layout.cut(dense[name].grad), atol=1e-4), name


def _check_replicas():
    mesh = ProcessMesh.create(MeshShape(tensor=SIZE))
    weight, bias = _global("weight", 6, 5), _global("bias", 6)
    layer = ColumnParallelLinear(5, 6, mesh, bias=True, sections=(2, 4), replicas=2)
    for parameter, value in ((layer.weight, weight), (layer.bias, bias)):
        parameter.data.copy_(parameter.mesh_layout.cut(value))
    # Two ranks of a pair feed different cotangents to the part they share: its gradient is their sum.
    layer(torch.ones(3, 5)).backward(torch.full((3, 3), float(mesh.rank("tensor"))))
    pair_sum = {0: 1.0, 1: 5.0}[mesh.rank("tensor") // 2]
    assert torch.equal(layer.weight.grad, torch.full((3, 5), 3 * pair_sum))
    assert torch.equal(layer.bias.grad, torch.full((3,), 3 * pair_sum))


def test_a_parallel_pair_equals_a_dense_pair():
    run_on_ranks(_check_pair, SIZE)


def test_replicas_sum_their_gradients():
    run_on_ranks(_check_replicas, SIZE)


def test_each_box_is_counted_once_by_deepspeeds_rule():
    meshes = [ProcessMesh(MeshShape(tensor=SIZE), rank) for rank in range(SIZE)]
    for make in (
        lambda mesh: ColumnParallelLinear(8, 16, mesh, bias=True),
        lambda mesh: ColumnParallelLinear(8, 16, mesh, bias=True, sections=(8, 8), replicas=2),
        lambda mesh: ColumnParallelLinear(8, 16, mesh, bias=True, sections=(8, 8), replicas=4),
        lambda mesh: RowParallelLinear(16, 8, mesh, bias=True),
    ):
        layers = [make(mesh) for mesh in meshes]
        for name, first in layers[0].named_parameters():
            counted = sum(
                layer.get_parameter(name).numel()
                for rank, layer in enumerate(layers)
                if rank == 0 or layer.get_parameter(name).model_parallel
            )
            assert counted == math.prod(first.mesh_layout.global_shape), name


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 along dim 0 is not divisible by 4"):
        ColumnParallelLinear(8, 10, ProcessMesh(MeshShape(tensor=SIZE), 0), bias=False)
