"""8-bit AdamW: its rule step by step, near 32-bit AdamW where the nearest code alone is not, sane at the edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_threads_change_nothing, drawn, nearest_codes, strided

from megatron_lite.kernels.adamw import adamw
from megatron_lite.kernels.adamw8bit import State8bit, adamw8bit
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise

SHAPES = ((0,), (1,), (33, 5), (255,), (257,), (3, 4, 700))
RULE = dict(lr=1e-2, betas=(0.9, 0.99), epsilon=1e-6, weight_decay=0.1)


def moments(state):
    return (
        dequantize_blockwise(state.first_codes, state.first_absmax, signed=True),
        dequantize_blockwise(state.second_codes, state.second_absmax, signed=False),
    )


def by_hand(parameter, gradient, state, step, keep):
    """The step in float64 from the state as stored: the parameter, and each slot's values, absmax and codes."""
    g, (m, v) = gradient.double(), (moment.double() for moment in moments(state))
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    update = m / (1 - 0.9**step) / (v.sqrt() / (1 - 0.99**step) ** 0.5 + 1e-6)
    slots = []
    for values, signed in ((m, True), (v, False)):
        absmax = torch.stack([block.abs().max() for block in values.flatten().split(256) if block.numel()] or [m.sum()])
        share = (values.flatten() / absmax.repeat_interleave(256)[: values.numel()]).nan_to_num(0)
        codes = torch.from_numpy(nearest_codes(share, signed)).view(values.shape)
        slots += [codes if signed or not keep else torch.where(v > 0, codes.clamp(min=1), codes), absmax]
    return parameter.double() * (1 - 1e-2 * 0.1) - 1e-2 * update, slots


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_follows_the_rule(dtype, keep, instruction_set):
    parameters = [drawn(*shape, dtype=dtype) for shape in SHAPES]
    states = [State8bit.zeros(parameter) for parameter in parameters]
    for step in range(1, 5):
        gradients = [drawn(*shape, seed=step) ** 3 * 0.01 for shape in SHAPES]
        assert_follows_the_rule(parameters, gradients, states, step, keep)


def assert_follows_the_rule(parameters, gradients, states, step, keep):
    """Take a step, and raise unless it is the one by hand."""
    expected = [by_hand(*of, step, keep) for of in zip(parameters, gradients, states, strict=True)]
    adamw8bit(parameters, gradients, states, step=step, keep_second_moments=keep, **RULE)
    for parameter, state, (value, slots) in zip(parameters, states, expected, strict=True):
        # Half a last digit, and fp32's own rounding before it.
        bound = 0.5001 * torch.finfo(parameter.dtype).eps * value.abs() + 1e-6
        assert ((parameter.double() - value).abs() <= bound).all()
        for ours, exact in zip(state, slots, strict=True):
            if ours.dtype == torch.float32:
                torch.testing.assert_close(ours.double(), exact[: len(ours)], rtol=1e-6, atol=0)
            else:
                # fp32's rounding may carry a value over the middle between two codes: one in some 10,000.
                differ = (ours.int() - exact).abs()
                assert (differ <= 1).all() and differ.sum() <= 2 + differ.numel() // 2000


@given(st.data())
def test_any_shapes_strides_and_dtypes(data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=4))
    parameters = [drawn(*shape, dtype=data.draw(st.sampled_from(DTYPES)), seed=i) for i, shape in enumerate(shapes)]
    states = [State8bit.zeros(parameter) for parameter in parameters]
    for step in (1, 2):
        gradients = [strided(data, shape, seed=9 + step) for shape in shapes]
        assert_follows_the_rule(parameters, gradients, states, step, data.draw(st.booleans()))


def largest_difference(gradients, keep):
    """max |p - p of 32-bit AdamW| after 40 steps at lr 1e-3."""
    rule = dict(lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8)
    ours, theirs = ([torch.zeros_like(gradients[0])] for _ in range(2))
    states, m, v = [State8bit.zeros(ours[0])], [torch.zeros_like(ours[0])], [torch.zeros_like(ours[0])]
    for step, gradient in enumerate(gradients, 1):
        adamw8bit(ours, [gradient], states, step=step, keep_second_moments=keep, **rule)
        adamw(theirs, [gradient], m, v, step=step, **rule)
    return (ours[0] - theirs[0]).abs().max().item()


def test_second_moments_that_vanish_explode_and_are_kept():
    # As of an embedding: in every block a few rows of large gradients beside many of tiny ones.
    scale = torch.where(torch.arange(64 * 256) % 61 == 0, 1.0, 1e-4)
    gradients = [drawn(64 * 256, seed=step) * scale for step in range(40)]
    assert largest_difference(gradients, keep=True) < 0.04
    assert largest_difference(gradients, keep=False) > 0.2


def test_near_32_bit_on_even_gradients():
    assert largest_difference([drawn(4096, seed=step) for step in range(40)], keep=True) < 0.005


def test_a_second_moment_of_zero_stays_zero():
    parameter = drawn(512)
    state, gradient = State8bit.zeros(parameter), torch.zeros(512)
    gradient[:10] = 1.0
    adamw8bit([parameter], [gradient], [state], step=1, lr=0.1)
    assert (state.second_codes[:10] == 255).all() and (state.second_codes[10:] == 0).all()
    assert (state.first_codes[10:] == 127).all() and state.second_absmax[1] == 0


def test_bytes_a_parameter():
    state = State8bit.zeros(torch.zeros(256 * 1000))
    assert sum(slot.nbytes for slot in state) / 256_000 == 2.03125


def test_the_number_of_threads_changes_nothing():
    def updated():
        parameter = drawn(300_001)
        state = State8bit.zeros(parameter)
        adamw8bit([parameter], [drawn(300_001, seed=1)], [state], step=1, **RULE)
        return [parameter, *state]

    assert_threads_change_nothing(updated)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_block_and_shows(bad, instruction_set):
    parameter, gradient = drawn(1000), drawn(1000, seed=1)
    state = State8bit.zeros(parameter)
    gradient[300] = bad
    adamw8bit([parameter], [gradient], [state], step=1, **RULE)
    assert parameter[300].isnan() and parameter[torch.arange(1000) != 300].isfinite().all()
    adamw8bit([parameter], [torch.ones(1000)], [state], step=2, **RULE)
    assert parameter[256:512].isnan().all()
    assert parameter[:256].isfinite().all() and parameter[512:].isfinite().all()


def test_gradients_of_any_strides_and_dtype():
    gradient = drawn(30, 20, 2, dtype=torch.bfloat16, seed=1)[..., 1].t()
    results = []
    for each in (gradient, gradient.float().contiguous()):
        parameter = torch.nn.Parameter(drawn(20, 30))
        adamw8bit([parameter], [each], [State8bit.zeros(parameter)], step=1, **RULE)
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_refusals_give_the_numbers():
    p = torch.zeros(300)
    state = State8bit.zeros(p)
    adamw8bit([], [], [], step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"0 states for 1 parameters"):
        adamw8bit([p], [p], [], step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"adamw8bit: step=0"):
        adamw8bit([p], [p], [state], step=0, lr=0.1)
    with pytest.raises(ValueError, match=r"first_absmax\[0\] has shape \(3,\) and its parameter \(300,\); \(2,\)"):
        adamw8bit([p], [p], [state._replace(first_absmax=torch.zeros(3))], step=1, lr=0.1)
    with pytest.raises(TypeError, match=r"second_codes\[0\] is torch.int8; torch.uint8 is needed"):
        adamw8bit([p], [p], [state._replace(second_codes=state.second_codes.char())], step=1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"an absmax has 3 elements where 2 belong"):
        slots = [[slot] for slot in state._replace(second_absmax=torch.zeros(3))]
        torch.ops.megatron_lite.adamw8bit([p], [p], *slots, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, True)
