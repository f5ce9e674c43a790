"""Rotary embedding against multiplication by complex numbers."""

import pytest
import torch

from megatron_lite.model.rotary import Rotary

LENGTH, HEAD_DIM = 9, 8
CPU = torch.device("cpu")


def _rotated(heads, width, base, positions, interleaved):
    """`heads` [S, B, N, D] in double, pair by pair."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = torch.polar(torch.ones((), dtype=torch.float64), positions.double().unsqueeze(-1) * frequencies)
    output = heads.double().clone()
    for pair in range(width // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        turned = torch.complex(output[..., first], output[..., second]) * turns[..., pair].unsqueeze(-1)
        output[..., first], output[..., second] = turned.real, turned.imag
    return output


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_turn_by_their_position(interleaved, width, dtype):
    rotary = Rotary(width, 100.0, interleaved=interleaved)
    heads = torch.randn(LENGTH, 2, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    # The tables grow; earlier positions stay what they were.
    for start in (0, 5, 1000):
        positions = torch.arange(start, start + LENGTH)
        expected = _rotated(heads, width, 100.0, positions.unsqueeze(1), interleaved)
        output = rotary.between(start, start + LENGTH, CPU)(heads)
        assert output.dtype == dtype
        assert (output - expected).norm() <= tolerance * expected.norm()

    positions_SB = torch.stack((torch.arange(LENGTH), torch.arange(LENGTH).flip(0)), 1)
    expected = _rotated(heads, width, 100.0, positions_SB, interleaved)
    assert (rotary.at(positions_SB, LENGTH)(heads) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved):
    rotation = Rotary(6, 100.0, interleaved=interleaved).between(2, 2 + LENGTH, CPU)
    heads = torch.randn(LENGTH, 2, 3, HEAD_DIM, requires_grad=True)
    cotangent = torch.randn_like(heads)
    rotation(heads).backward(cotangent.clone())
    # A rotation is orthogonal: its transpose takes every output back.
    assert torch.allclose(rotation(heads.grad), cotangent, atol=1e-5)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="5 values a head are not even"):
        Rotary(5, 1e4)
