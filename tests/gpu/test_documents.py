"""Variable-length flash attention on a GPU is, within documents, what blocks of them give; its dropout repeats."""

import pytest
import torch

from megatron_lite.model.attention import sdpa
from megatron_lite.model.documents import Documents, attend_by_lengths, attend_in_blocks
from megatron_lite.parallel.ring_attention import has_gpu_flash


@pytest.fixture
def documents(device) -> Documents:
    if device == "cpu":
        pytest.skip("the kernel is a GPU's")
    begins = torch.zeros(2, 300, dtype=torch.bool)
    begins[0, [0, 1, 40, 170]] = True
    return Documents(begins, torch.device("cuda", torch.cuda.current_device()))


def _heads(groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    drawn = (torch.randn(300, 2, heads, 64, device="cuda", dtype=dtype) for heads in (4, groups, groups))
    return [heads.permute(1, 2, 0, 3).requires_grad_() for heads in drawn]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_values_and_gradients(groups, documents):
    inputs = _heads(groups, torch.bfloat16)
    assert has_gpu_flash(inputs[0])
    gradient = torch.randn_like(inputs[0])
    output = attend_by_lengths(*inputs, documents, 0.0, None)
    ours = [output, *torch.autograd.grad(output, inputs, gradient)]
    exact = [heads.detach().float().requires_grad_() for heads in inputs]
    expected = attend_in_blocks(sdpa, *exact, documents, 0.0, None)
    for a, b in zip(ours, [expected, *torch.autograd.grad(expected, exact, gradient.float())], strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_dropout_repeats_by_its_seed(documents):
    query, key, value = _heads(2, torch.bfloat16)
    draws = [attend_by_lengths(query, key, torch.ones_like(value), documents, 0.25, seed) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].float().mean().item() == pytest.approx(1, abs=0.05)
