"""Norms that keep their output for the gradient: what that costs in digits, what it saves, and where it ends."""

import functools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, SHAPES, drawn

from megatron_lite.kernels.layer_norm import layer_norm, residual_layer_norm
from megatron_lite.kernels.rms_norm import residual_rms_norm, rms_norm

NORMS = pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
FUNCTIONS = {"layer_norm": (layer_norm, residual_layer_norm), "rms_norm": (rms_norm, residual_rms_norm)}


def arguments(kind, shape, dtype, smallest_weight=0.2):
    """Input and weights; weights of both signs, none closer to 0 than that."""
    weight = drawn(shape[-1], seed=2)
    weight = torch.where(weight < 0, -1.0, 1.0) * weight.abs().clamp(min=smallest_weight)
    vectors = [weight.to(dtype)]
    if kind == "layer_norm":
        vectors.append(drawn(shape[-1], dtype=dtype, seed=3))
    return [drawn(*shape, dtype=dtype), *vectors]


def gradients(function, tensors, cotangent):
    leaves = [t.detach().requires_grad_() for t in tensors]
    function(*leaves).backward(cotangent)
    return [leaf.grad for leaf in leaves]


def exact_gradients_and_bounds(kind, tensors, cotangent):
    """In float64: every gradient, and how far off it may be if the normalised value is off by its stated bound."""
    x, weight, *bias = (t.double() for t in tensors)
    dy, length = cotangent.double(), x.shape[-1]
    functional = F.layer_norm if bias else F.rms_norm
    exact = gradients(lambda *a: functional(a[0], (length,), *a[1:], eps=1e-5), [x, weight, *bias], dy)
    normal = functional(x, (length,), eps=1e-5)
    inverse = torch.rsqrt((x.var(-1, correction=0, keepdim=True) if bias else x.square().mean(-1, keepdim=True)) + 1e-5)
    digit = torch.finfo(tensors[0].dtype).eps
    off = digit / 2 * (normal.abs() + (bias[0] / weight).abs() if bias else normal.abs())
    g = dy * weight
    mean = (g * normal).mean(-1, keepdim=True)
    off_mean = (g.abs() * off).mean(-1, keepdim=True)
    bounds = [inverse * (off * mean.abs() + (normal.abs() + off) * off_mean)]
    bounds += [(dy.abs() * off).flatten(0, -2).sum(0), *(torch.zeros_like(b) for b in bias)]
    # And what fp32 on the way and the rounding of the result cost any gradient.
    size = [
        inverse * (g.abs() + g.abs().mean(-1, keepdim=True) + normal.abs() * (g * normal).abs().mean(-1, keepdim=True))
    ]
    size += [(dy * normal).abs().flatten(0, -2).sum(0), *(dy.abs().flatten(0, -2).sum(0) for _ in bias)]
    rounding = [digit / 2 * e.abs() + 1e-6 * s for e, s in zip(exact, size, strict=True)]
    return exact, [1.01 * b + r for b, r in zip(bounds, rounding, strict=True)]


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_gradients_are_within_the_stated_bound(kind, shape, dtype, instruction_set):
    tensors, cotangent = arguments(kind, shape, dtype), drawn(*shape, dtype=dtype, seed=9)
    lean = functools.partial(FUNCTIONS[kind][0], memory_efficient=True)
    exact, bounds = exact_gradients_and_bounds(kind, tensors, cotangent)
    for ours, truth, bound in zip(gradients(lean, tensors, cotangent), exact, bounds, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert ((ours.double() - truth).abs() <= bound).all(), ((ours.double() - truth).abs() / bound).max()


@NORMS
def test_a_tiny_weight_costs_an_rms_norm_nothing_and_a_layer_norm_what_its_bias_does(kind):
    tensors = arguments(kind, (64, 100), torch.float32, smallest_weight=1.0)
    tensors[1][7] = 1e-30
    if kind == "layer_norm":
        tensors[2][7] = 0
    cotangent = drawn(64, 100, seed=9)
    lean, plain = (functools.partial(FUNCTIONS[kind][0], memory_efficient=on) for on in (True, False))
    for ours, theirs in zip(gradients(lean, tensors, cotangent), gradients(plain, tensors, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_zero_makes_nan_never_a_wrong_number(kind, dtype, instruction_set):
    tensors, cotangent = arguments(kind, (5, 70), dtype), drawn(5, 70, dtype=dtype, seed=9)
    tensors[1][66] = 0
    into_input, into_weight, *_ = gradients(
        functools.partial(FUNCTIONS[kind][0], memory_efficient=True), tensors, cotangent
    )
    assert into_input.isnan().all() and into_weight[66].isnan() and into_weight[:66].isfinite().all()


@NORMS
def test_after_a_residual_it_is_the_same(kind):
    single, residual_kind = (functools.partial(f, memory_efficient=True) for f in FUNCTIONS[kind])
    x, *vectors = arguments(kind, (37, 65), torch.float32)
    residual, cotangent = drawn(37, 65, seed=5), drawn(37, 65, seed=9)
    leaves = [t.requires_grad_() for t in (x, residual, *vectors)]
    output, total = residual_kind(*leaves)
    torch.autograd.backward([output, total], [cotangent, 2 * cotangent])
    alone = gradients(single, [total, *vectors], cotangent)
    torch.testing.assert_close(x.grad, alone[0] + 2 * cotangent)
    assert torch.equal(x.grad, residual.grad)
    assert all(torch.equal(v.grad, a) for v, a in zip(vectors, alone[1:], strict=True))


@NORMS
@pytest.mark.parametrize("lean", [True, False])
def test_the_output_is_kept_or_the_input(kind, lean):
    x, *vectors = (t.requires_grad_() for t in arguments(kind, (6, 8), torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        output = FUNCTIONS[kind][0](x, *vectors, memory_efficient=lean)
    assert (output.data_ptr() in kept) is lean and (x.data_ptr() in kept) is not lean
