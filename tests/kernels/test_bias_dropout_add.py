"""Bias, dropout and residual: the mask is Philox's to the bit and behaves as chance; exact; nothing is kept."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, SHAPES, assert_as_exact_as, assert_threads_change_nothing, drawn, gradients, strided

from megatron_lite.kernels.bias_dropout_add import bias_dropout_add

# Among fewer values a peer may be exact by chance; those shapes are compared with the reference in test_operators.py.
ENOUGH = [shape for shape in SHAPES if math.prod(shape) not in range(1, 100)]
WORD = 0xFFFFFFFF


def philox(counter, key, rounds=7):
    """Philox-4x32 by Python's own integers."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(rounds):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second & WORD, first >> 32 ^ d ^ high, first & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return a, b, c, d


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (10, (0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (7, (0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (WORD,) * 4, (WORD, WORD), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_the_definition_gives_the_published_answers(rounds, counter, key, words):
    """Known answers of Random123, the generator's own distribution."""
    assert philox(counter, key, rounds) == words


def kept(shape, probability, seed, first=0):
    return bias_dropout_add(torch.ones(shape), None, None, probability, seed, first=first) != 0


@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, 2**64 - 1, -5])
@pytest.mark.parametrize("first", [0, 3, 2**34 - 6])
def test_the_mask_is_philox(seed, first, instruction_set):
    expected = []
    for index in range(first, first + 3 * 37):
        counter = index // 4 & WORD, index // 4 >> 32, 0, 0
        word = philox(counter, (seed & WORD, seed >> 32 & WORD))[index % 4]
        expected.append(word >= int(0.3 * 2**32))
    assert kept((3, 37), 0.3, seed, first).flatten().tolist() == expected


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_the_mask_behaves_as_chance(probability):
    """Mean, variance, neighbours, rows and seeds: each within four standard errors of independent draws."""
    rows, length = 1024, 1024
    spread = probability * (1 - probability)
    masks = [kept((rows, length), probability, seed).double() - (1 - probability) for seed in (7, 8, 7 << 32)]
    error = spread / math.sqrt(rows * length)
    for mask in masks:
        assert abs(mask.mean()) < 4 * math.sqrt(spread / (rows * length))
        for lines in (mask.sum(0), mask.sum(1)):
            # The variance of sums over independent draws, itself known to sqrt(2 / lines).
            assert abs(lines.var() / (spread * length) - 1) < 4 * math.sqrt(2 / length)
        flat = mask.flatten()
        for lag in (1, 2, 3, 4, 5, 8, 16, 63, 64, length, length + 1):
            assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 * error
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[one] * masks[other]).mean()) < 4 * error


def test_parts_of_a_tensor_have_their_part_of_its_mask(instruction_set):
    whole = kept((6, 5, 13), 0.4, 11)
    for parts in (2, 3, 6):
        each = [kept((6 // parts, 5, 13), 0.4, 11, first=rank * 6 // parts * 65) for rank in range(parts)]
        assert torch.equal(torch.cat(each), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("shape", [*ENOUGH, (2, 2100), (3, 0)], ids=str)
def test_as_exact_as_torch(shape, probability, dtype, instruction_set):
    mask = kept(shape, probability, 5)

    def ours(x, bias, residual):
        return bias_dropout_add(x, bias, residual, probability, 5)

    def theirs(x, bias, residual):
        return residual + (x + bias) * mask / (1 - probability)

    tensors = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1), drawn(*shape, dtype=dtype, seed=2)
    results = gradients(ours, tensors), gradients(theirs, tensors), gradients(theirs, tensors, torch.float64)
    for o, t, e in zip(*results, strict=True):
        assert_as_exact_as(t, o, e)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_what_is_absent_adds_nothing_and_nothing_is_kept(has_bias, has_residual, probability):
    tensors = drawn(7, 130), drawn(130, seed=1) * has_bias, drawn(7, 130, seed=2) * has_residual

    def partly(x, bias, residual):
        return bias_dropout_add(x, bias if has_bias else None, residual if has_residual else None, probability, 3)

    def wholly(x, bias, residual):
        return bias_dropout_add(x, bias, residual, probability, 3)

    leaves = [t.clone().requires_grad_() for t in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        output = partly(*leaves)
    assert not saved
    output.backward(drawn(7, 130, seed=11))
    expected = gradients(wholly, tensors)
    for ours, other, present in zip(
        [output, *(leaf.grad for leaf in leaves)], expected, [True, True, has_bias, has_residual], strict=True
    ):
        assert torch.equal(ours, other) if present else ours is None


def test_without_a_bias_it_can_be_differentiated_again_and_with_one_that_is_refused():
    x, bias = drawn(3, 8).requires_grad_(), drawn(8, seed=1).requires_grad_()
    for b in (None, bias):
        (dx,) = torch.autograd.grad(bias_dropout_add(x, b, x, 0.5, 1).square().sum(), x, create_graph=True)
        if b is None:
            factor = 1 + 2 * kept((3, 8), 0.5, 1)
            assert torch.equal(torch.autograd.grad(dx.sum(), x)[0], 2.0 * factor**2)
        else:
            with pytest.raises(RuntimeError, match="bias_dropout_add_backward has no gradient"):
                dx.sum().backward()


@given(st.data())
def test_any_shape_and_strides(data):
    dims = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dims[-1] = data.draw(st.integers(0, 200))
    x = strided(data, dims)
    bias, residual = drawn(x.shape[-1], 3, seed=2)[:, 1], drawn(*x.shape, seed=3)
    seed = data.draw(st.integers(-(2**63), 2**64 - 1))
    output = bias_dropout_add(x, bias, residual, 0.4, seed)
    assert output.is_contiguous()
    expected = residual + (x + bias) * kept(x.shape, 0.4, seed) / 0.6
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_where_it_came_in_unless_it_is_dropped(dtype, instruction_set):
    mask = kept((3, 140), 0.5, 2)
    x, bias, residual = torch.full((3, 140), math.nan, dtype=dtype), drawn(140, dtype=dtype), torch.ones(3, 140)
    residual = residual.to(dtype).requires_grad_()
    x[1] = math.inf
    x.requires_grad_()
    bias.requires_grad_()
    output = bias_dropout_add(x, bias, residual, 0.5, 2)
    assert torch.equal(output.isnan(), mask & ~x.isinf()) and torch.equal(output.isinf(), mask & x.isinf())
    assert (output[~mask] == 1).all()
    gradient = torch.ones_like(output)
    gradient[2, 5] = math.nan
    output.backward(gradient)
    assert x.grad.isnan().nonzero().tolist() == [[2, 5]] * mask[2, 5].item()
    assert residual.grad.isnan().nonzero().tolist() == [[2, 5]]
    assert bias.grad.isnan().nonzero().flatten().tolist() == [5] * mask[2, 5].item()


def test_the_number_of_threads_changes_nothing():
    tensors = drawn(1000, 130, dtype=torch.bfloat16), drawn(130, dtype=torch.bfloat16, seed=1)
    residual = drawn(1000, 130, dtype=torch.bfloat16, seed=2)
    assert_threads_change_nothing(lambda: gradients(lambda *t: bias_dropout_add(*t, residual, 0.3, 9), tensors))


def test_compiles_without_a_graph_break_and_not_again_for_every_seed():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, seed: bias_dropout_add(x * 2, None, x, 0.5, seed), fullgraph=True, backend=backend
    )
    x = drawn(4, 9)
    for seed in (12, 2**63 - 3, 2**40, 99, 100):
        assert torch.equal(compiled(x, seed), bias_dropout_add(x * 2, None, x, 0.5, seed))
    assert len(graphs) <= 2


def test_refusals_give_the_numbers():
    x, bias = torch.zeros(2, 6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\) and input \(2, 6\); \(6,\) is needed"):
        bias_dropout_add(x, torch.zeros(5), x, 0.1, 0)
    with pytest.raises(ValueError, match=r"residual has shape \(6,\) and input \(2, 6\)"):
        bias_dropout_add(x, bias, bias, 0.1, 0)
    with pytest.raises(TypeError, match=r"residual is torch.bfloat16 and input is torch.float32"):
        bias_dropout_add(x, bias, x.bfloat16(), 0.1, 0)
    with pytest.raises(ValueError, match="bias is on meta and input is on cpu"):
        bias_dropout_add(x, bias.to("meta"), None, 0.1, 0)
    for probability in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"probability is {probability}; at least 0 and less than 1"):
            bias_dropout_add(x, bias, None, probability, 0)
    with pytest.raises(ValueError, match="first is -4; it counts elements from 0"):
        bias_dropout_add(x, bias, None, 0.1, 0, first=-4)
    with pytest.raises(RuntimeError, match="residual has 3 elements where 12 belong"):
        torch.ops.megatron_lite.bias_dropout_add(x, None, torch.zeros(3), 0.1, 0, 0)
