"""Norms and activations against their formulas in double."""

import dataclasses
import math

import pytest
import torch

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.block import Block
from megatron_lite.model.forward_pass import ForwardPass
from megatron_lite.model.mlp import ACTIVATIONS, swiglu
from megatron_lite.model.norm import layer_norm, rms_norm
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh


def _rms(values, weight):
    return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layer(values, weight, bias):
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize(
    ("function", "formula", "vectors"),
    [
        (lambda *a: rms_norm(*a, 1e-5), _rms, 1),
        (lambda *a: layer_norm(*a, 1e-5), _layer, 2),
    ],
    ids=["rms_norm", "layer_norm"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_norms(function, formula, vectors, dtype, tolerance, scale):
    generator = torch.Generator().manual_seed(0)
    inputs = [scale * torch.randn(5, 3, 24, generator=generator)]
    inputs += [torch.randn(24, generator=generator) for _ in range(vectors)]
    cotangent = torch.randn(3, 5, 24, generator=generator).to(dtype).transpose(0, 1)

    inputs = [value.to(dtype) for value in inputs]
    ours = [value.clone().requires_grad_() for value in inputs]
    theirs = [value.double().requires_grad_() for value in inputs]
    output, expected = function(*ours), formula(*theirs)
    output.backward(cotangent)
    expected.backward(cotangent.double())
    assert output.dtype == dtype
    for value, reference in [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert (value - reference).norm() <= tolerance * reference.norm()


def test_activations():
    values = torch.linspace(-4, 4, 41, dtype=torch.float64)
    tanh = 0.5 * values * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
    expected = {
        "gelu_tanh": tanh,
        "gelu": 0.5 * values * (1 + torch.erf(values / math.sqrt(2))),
        "relu": values.clamp(min=0),
        "squared_relu": values.clamp(min=0) ** 2,
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, reference in expected.items():
        assert torch.allclose(ACTIVATIONS[name](values), reference), name
    gate, up = values, values.flip(0) + 1
    assert torch.allclose(swiglu(torch.cat((gate, up))), gate / (1 + torch.exp(-gate)) * up)


def test_post_norm_comes_after_the_addition():
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, norm_position="post")
    mesh = ProcessMesh.create(MeshShape())
    block = Block(config, mesh, 0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    hidden, run = torch.randn(6, 2, 16), ForwardPass(TensorAxis(mesh))
    middle = block.attention_norm(hidden + block.attention(hidden, run), run.axis)
    expected = block.mlp_norm(middle + block.mlp(middle, run.axis), run.axis)
    assert torch.equal(block(hidden, run), expected)

    pre = Block(dataclasses.replace(config, norm_position="pre"), mesh, 0)
    pre.load_state_dict(block.state_dict())
    assert not torch.allclose(pre(hidden, run), expected)
