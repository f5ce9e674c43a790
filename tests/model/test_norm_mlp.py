"""Norms and activations against their formulas in double."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.block import Block
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.model.mlp import ACTIVATIONS, MLP
from megatron_lite.model.norm import Norm
from megatron_lite.parallel.linear import TensorAxis
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh


def _rms(values, weight):
    return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layer(values, weight, bias):
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize(("kind", "formula"), [("RMSNorm", _rms), ("LayerNorm", _layer)])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("native", torch.float32, 1e-6),
        ("native", torch.bfloat16, 6e-3),
        ("torch", torch.float32, 1e-6),
        ("torch", torch.bfloat16, 2e-2),  # torch rounds on the way
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_norms(kind, formula, backend, dtype, tolerance, scale):
    generator = torch.Generator().manual_seed(0)
    mesh = ProcessMesh.create(MeshShape())
    config = ModelConfig(hidden_size=24, normalization=kind)
    norm = Norm(config, mesh, KernelsConfig(norm_backend=backend), dtype=dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    hidden = (scale * torch.randn(5, 3, 24, generator=generator)).to(dtype)
    cotangent = torch.randn(3, 5, 24, generator=generator).to(dtype).transpose(0, 1)

    ours = [hidden.clone().requires_grad_(), *norm.parameters()]
    theirs = [value.detach().double().requires_grad_() for value in ours]
    output, expected = norm(ours[0], TensorAxis(mesh)), formula(*theirs)
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
    values = values.float()
    shift = torch.full((41,), 0.25)
    for name, reference in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](values, None), reference.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ACTIVATIONS[name](values - shift, shift), reference.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
def test_the_layer_is_its_formula(activation):
    config = ModelConfig(
        hidden_size=16,
        ffn_hidden_size=24,
        swiglu=activation == "swiglu",
        activation_func="relu" if activation == "swiglu" else activation,
    )
    mesh = ProcessMesh.create(MeshShape())
    mlp = MLP(config, mesh)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    hidden = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0))
    first = mlp.gate_up if config.swiglu else mlp.up
    inner = F.linear(hidden, first.weight, first.bias)
    if config.swiglu:
        gate, up = inner.chunk(2, -1)
        inner = F.silu(gate) * up
    else:
        inner = ACTIVATIONS[activation](inner, None)
    expected = F.linear(inner, mlp.down.weight, mlp.down.bias)
    output, bias = mlp(hidden, TensorAxis(mesh))
    assert bias is mlp.down.bias
    torch.testing.assert_close(output if bias is None else output + bias, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [None, 5])
def test_post_norm_comes_after_the_addition_and_pre_norm_before(seed, bias):
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        norm_position="post",
        add_bias_linear=bias,
        hidden_dropout=0.5,
        attention_dropout=0.0,
    )
    mesh = ProcessMesh.create(MeshShape())
    post = Block(config, mesh, 0, KernelsConfig())
    with torch.no_grad():
        for parameter in post.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    pre = Block(dataclasses.replace(config, norm_position="pre"), mesh, 0, KernelsConfig())
    pre.load_state_dict(post.state_dict())
    hidden = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1))
    run = ForwardPass(TensorAxis(mesh), seed)

    def dropped(output, bias, site):
        return run.dropout(output if bias is None else output + bias, 0.5, 0, site)

    middle = post.attention_norm(hidden + dropped(*post.attention(hidden, run), Site.ATTENTION_OUTPUT), run.axis)
    expected = post.mlp_norm(middle + dropped(*post.mlp(middle, run.axis), Site.MLP_OUTPUT), run.axis)
    torch.testing.assert_close(post(hidden, run), expected)

    normal = pre.attention_norm(hidden, run.axis)
    middle = hidden + dropped(*pre.attention(normal, run), Site.ATTENTION_OUTPUT)
    expected = middle + dropped(*pre.mlp(pre.mlp_norm(middle, run.axis), run.axis), Site.MLP_OUTPUT)
    torch.testing.assert_close(pre(hidden, run), expected)
