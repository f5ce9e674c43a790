"""8-bit AdamW beside implementations of others: torchao for codes, bitsandbytes for layout and the update."""

from __future__ import annotations

import logging

import pytest
import torch
from kernel_cases import drawn

from megatron_lite.kernels.adamw8bit import State8bit, adamw8bit
from megatron_lite.kernels.code_maps import SIGNED, UNSIGNED
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

RULE = {"lr": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8}
ELEMENTS = 128 * 256


@pytest.fixture(scope="module")
def torchao():
    # It tells at length which of its own GPU libraries do not fit.
    logging.disable(logging.WARNING)
    from torchao.optim import adam, quant_utils, subclass_8bit

    logging.disable(logging.NOTSET)
    return adam, quant_utils, subclass_8bit


@pytest.fixture(scope="module")
def bitsandbytes():
    import bitsandbytes

    return bitsandbytes


def gradients(steps, *, log_normal):
    scale = torch.exp(2 * drawn(ELEMENTS, seed=99)) if log_normal else torch.ones(ELEMENTS)
    return [drawn(ELEMENTS, seed=step) * scale * 1e-3 for step in range(1, steps + 1)]


def test_the_maps_are_torchaos_and_bitsandbytes(torchao, bitsandbytes):
    _, quant_utils, _ = torchao
    for signed, ours in ((True, SIGNED), (False, UNSIGNED)):
        ours = torch.tensor(ours)
        for theirs in (
            torch.tensor(quant_utils.create_dynamic_map(signed)),
            bitsandbytes.functional.create_dynamic_map(signed),
        ):
            torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_torchaos(signed, torchao):
    _, quant_utils, _ = torchao
    values = drawn(ELEMENTS) * torch.exp(3 * drawn(ELEMENTS, seed=1))
    values = values if signed else values.square()
    share, scale = quant_utils.scale_tensor(values, 256)
    theirs = quant_utils.quantize_8bit_with_qmap(share, torch.tensor(SIGNED if signed else UNSIGNED))
    codes, absmax = quantize_blockwise(values, signed=signed)
    assert torch.equal(absmax, scale)
    # Its middle between two codes is rounded to fp32, ours is exact.
    differ = (codes.int() - theirs.int()).abs()
    assert differ.max() <= 1 and differ.sum() <= 3


@pytest.mark.parametrize("log_normal", [False, True])
def test_forty_steps_are_torchaos(log_normal, torchao):
    adam, _, subclass_8bit = torchao
    ours, theirs = drawn(ELEMENTS, seed=7), drawn(ELEMENTS, seed=7)
    state = State8bit.zeros(ours)
    moments = [subclass_8bit.OptimState8bit.zeros((ELEMENTS,), signed) for signed in (True, False)]
    for moment, map in zip(moments, (SIGNED, UNSIGNED), strict=True):
        moment.qmap.copy_(torch.tensor(map))
    for step, gradient in enumerate(gradients(40, log_normal=log_normal), 1):
        adamw8bit([ours], [gradient], [state], step=step, weight_decay=0.1, keep_second_moments=False, **RULE)
        lr = torch.tensor(RULE["lr"])
        adam.single_param_adam(
            theirs, gradient, torch.tensor(float(step)), *moments, None, lr, 0.9, 0.999, 0.1, 1e-8, True, False
        )
    for codes, absmax, moment in (
        (state.first_codes, state.first_absmax, moments[0]),
        (state.second_codes, state.second_absmax, moments[1]),
    ):
        torch.testing.assert_close(absmax, moment.scale, rtol=2e-2, atol=0)
        # fp32's rounding carries an element over the middle between two codes, now and then.
        assert ((codes.int() - moment.codes.int()).abs() > 0).float().mean() < 1e-3
    same = (state.first_codes == moments[0].codes) & (state.second_codes == moments[1].codes)
    torch.testing.assert_close(ours[same], theirs[same], rtol=1e-3, atol=1e-4)


def test_the_update_is_bitsandbytes(bitsandbytes):
    """From one state, laid out alike: the parameter after a step to rounding, the new state to a code."""
    parameter, state = drawn(ELEMENTS, seed=7), State8bit.zeros(torch.zeros(ELEMENTS))
    *before, last = gradients(6, log_normal=True)
    for step, gradient in enumerate(before, 1):
        adamw8bit([parameter], [gradient], [state], step=step, **RULE)
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, eps=1e-8, weight_decay=0.0, min_8bit_size=1)
    theirs.grad = before[0]
    optimizer.step()
    held = optimizer.state[theirs]
    slots = ("state1", "absmax1", "state2", "absmax2")
    for name, slot in zip(slots, state, strict=True):
        assert held[name].shape == slot.shape and held[name].dtype == slot.dtype
        held[name].copy_(slot)
    held["step"] = len(before)
    with torch.no_grad():
        theirs.copy_(parameter)
    theirs.grad = last
    optimizer.step()
    adamw8bit([parameter], [last], [state], step=len(before) + 1, keep_second_moments=False, **RULE)
    torch.testing.assert_close(parameter, theirs.detach(), rtol=1e-6, atol=1e-8)
    for codes, absmax, their_codes, their_absmax, signed in (
        (*state[:2], held["state1"], held["absmax1"], True),
        (*state[2:], held["state2"], held["absmax2"], False),
    ):
        torch.testing.assert_close(absmax, their_absmax, rtol=1e-6, atol=0)
        ours, other = (dequantize_blockwise(c, absmax, signed=signed) for c in (codes, their_codes))
        # On a CPU its quantiser is coarse where values are small beside their block's largest.
        assert ((ours - other).abs() <= 0.02 * absmax.repeat_interleave(256)).all()
        assert (ours - other).norm() < 0.02 * ours.norm()
