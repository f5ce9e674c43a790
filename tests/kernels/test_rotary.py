"""Rotary embedding: exact, equal to transformers' LLaMA and GPT-J at any strides; its own inverse and gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_as_exact_as, drawn, gradients, strided
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from megatron_lite.kernels.rotary import rotary

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def tables(positions, batch, pairs):
    angles = 1e3 * torch.rand(positions, batch, pairs, generator=torch.Generator().manual_seed(pairs))
    return angles.cos(), angles.sin()


def by_torch(heads, cosines, sines, interleaved):
    """In the dtype of the heads, as models do."""
    cosines, sines = (t.unsqueeze(2).to(heads.dtype) for t in (cosines, sines))
    turning, rest = heads.split([2 * cosines.shape[-1], heads.shape[-1] - 2 * cosines.shape[-1]], -1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
    turned = first * cosines - second * sines, second * cosines + first * sines
    return torch.cat((torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1), rest), -1)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "table_batch", "pairs"),
    [
        ((5, 2, 3, 64), 1, 32),
        ((5, 2, 3, 64), 2, 16),
        ((9, 1, 7, 33), 1, 13),
        ((3, 2, 2, 2200), 1, 1100),
        ((4, 1, 2, 20), 1, 0),
    ],
    ids=str,
)
def test_as_exact_as_torch(shape, table_batch, pairs, interleaved, dtype, instruction_set):
    cosines, sines = tables(shape[0], table_batch, pairs)

    def ours(heads):
        return rotary(heads, cosines, sines, interleaved=interleaved)

    def theirs(heads):
        return by_torch(heads, cosines, sines, interleaved)

    heads = [drawn(*shape, dtype=dtype)]
    results = gradients(ours, heads), gradients(theirs, heads), gradients(theirs, heads, torch.float64)
    for o, t, e in zip(*results, strict=True):
        assert_as_exact_as(t, o, e)


def test_equals_llama_of_transformers():
    query, key = drawn(6, 2, 4, 16), drawn(6, 2, 2, 16, seed=1)
    cosines, sines = tables(6, 2, 8)
    theirs = llama_rotary(
        *(heads.permute(1, 2, 0, 3) for heads in (query, key)),
        *(torch.cat((table, table), -1).transpose(0, 1) for table in (cosines, sines)),
    )
    for heads, other in zip((query, key), theirs, strict=True):
        torch.testing.assert_close(rotary(heads, cosines, sines), other.permute(2, 0, 1, 3), rtol=0, atol=1e-6)


def test_equals_gptj_of_transformers():
    heads, (cosines, sines) = drawn(6, 2, 4, 16), tables(6, 2, 8)
    theirs = gptj_rotary(heads.transpose(0, 1), sines.transpose(0, 1), cosines.transpose(0, 1))
    ours = rotary(heads, cosines, sines, interleaved=True)
    torch.testing.assert_close(ours, theirs.transpose(0, 1), rtol=0, atol=1e-6)


@LAYOUTS
def test_the_inverse_takes_it_back_and_the_gradient_is_the_inverse(interleaved):
    heads, (cosines, sines) = drawn(5, 2, 3, 40), tables(5, 1, 15)
    options = {"interleaved": interleaved}
    turned = rotary(heads, cosines, sines, **options)
    torch.testing.assert_close(rotary(turned, cosines, sines, inverse=True, **options), heads)
    assert torch.equal(turned[..., 30:], heads[..., 30:]) and not torch.equal(turned[..., :30], heads[..., :30])
    for inverse in (False, True):
        leaf = heads.clone().requires_grad_()
        rotary(leaf, cosines, sines, inverse=inverse, **options).backward(turned)
        assert torch.equal(leaf.grad, rotary(turned, cosines, sines, inverse=not inverse, **options))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_given_away_is_turned_in_place(dtype, interleaved, instruction_set):
    heads, (cosines, sines) = drawn(5, 2, 3, 40, dtype=dtype).requires_grad_(), tables(5, 1, 15)
    gradient = drawn(5, 2, 3, 40, dtype=dtype, seed=1)
    expected = rotary(gradient, cosines, sines, interleaved=interleaved, inverse=True)
    for kept, overwrite in ((True, False), (False, True)):
        given = gradient.clone()
        output = rotary(heads, cosines, sines, interleaved=interleaved, overwrite_gradient=overwrite)
        (result,) = torch.autograd.grad(output, heads, given)
        assert torch.equal(result, expected) and torch.equal(given, gradient) is kept
        assert (result.data_ptr() == given.data_ptr()) is overwrite
        # What is no row of heads by itself is never written: all of an expanded gradient is one number.
        output = rotary(heads, cosines, sines, interleaved=interleaved, overwrite_gradient=overwrite)
        (result,) = torch.autograd.grad(output.sum(), heads)
        ones = rotary(torch.ones_like(heads), cosines, sines, interleaved=interleaved, inverse=True)
        assert torch.equal(result, ones)


def test_it_can_be_differentiated_again():
    cosines, sines = tables(2, 1, 3)
    heads = drawn(2, 1, 2, 7).requires_grad_()
    for overwrite in (False, True):
        (gradient,) = torch.autograd.grad(
            rotary(heads, cosines, sines, overwrite_gradient=overwrite).square().sum(), heads, create_graph=True
        )
        # The length of every pair stays, so this is the gradient of the squares' sum, 2 x, and its slope is 2.
        (second,) = torch.autograd.grad(gradient.sum(), heads)
        torch.testing.assert_close(second, torch.full_like(heads, 2))


@given(st.data())
def test_any_shape_and_strides(data):
    dims = [data.draw(st.integers(0, 4)) for _ in range(3)] + [data.draw(st.integers(0, 40))]
    heads = strided(data, dims)[..., :: data.draw(st.sampled_from([1, 2]))]
    cosines, sines = tables(dims[0], data.draw(st.sampled_from([1, dims[1]])), heads.shape[-1] // 2)
    interleaved = data.draw(st.booleans())
    output = rotary(heads, cosines, sines, interleaved=interleaved)
    assert output.is_contiguous()
    torch.testing.assert_close(output, by_torch(heads, cosines, sines, interleaved), rtol=1e-6, atol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_pair(dtype, interleaved, instruction_set):
    heads, (cosines, sines) = drawn(2, 1, 3, 140, dtype=dtype), tables(2, 1, 66)
    heads[1, 0, 2, 6] = math.nan
    heads[0, 0, 0, 135] = math.inf
    output = rotary(heads, cosines, sines, interleaved=interleaved)
    other = 7 if interleaved else 6 + 66
    assert output.isnan().nonzero().tolist() == [[1, 0, 2, 6], [1, 0, 2, other]]
    assert output.isinf().nonzero().tolist() == [[0, 0, 0, 135]]


def test_compiles_without_a_graph_break():
    cosines, sines = tables(3, 1, 4)

    def turned(heads):
        return rotary(heads * 2, cosines, sines, overwrite_gradient=True)

    plain, compiled = (drawn(3, 2, 2, 8).requires_grad_() for _ in range(2))
    output = torch.compile(turned, fullgraph=True, backend="aot_eager")(compiled)
    expected = turned(plain)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(compiled.grad, plain.grad)


def test_refusals_give_the_numbers():
    heads, (cosines, sines) = drawn(4, 2, 3, 8), tables(4, 1, 4)
    with pytest.raises(TypeError, match=r"input is torch.float64; float32, bfloat16 and float16"):
        rotary(heads.double(), cosines, sines)
    with pytest.raises(TypeError, match=r"sines are torch.bfloat16; float32 is needed"):
        rotary(heads, cosines, sines.bfloat16())
    with pytest.raises(ValueError, match="cosines are on meta and heads on cpu"):
        rotary(heads, cosines.to("meta"), sines)
    for table in (cosines[:3], cosines[:, 0], torch.zeros(4, 3, 4), torch.zeros(4, 1, 5)):
        with pytest.raises(ValueError, match=r"heads have shape \(4, 2, 3, 8\), cosines .*; \(S, B, N, D\) and two"):
            rotary(heads, table, table)
    operator = torch.ops.megatron_lite.rotary
    with pytest.raises(RuntimeError, match="5 pairs do not fit into a head of 8"):
        operator(heads, torch.zeros(4, 1, 5), torch.zeros(4, 1, 5), False, False, False)
    with pytest.raises(RuntimeError, match="rotary_ wants contiguous heads"):
        torch.ops.megatron_lite.rotary_(heads.transpose(0, 1), torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), False, False)
