"""Blocks of ring attention on a GPU: merged, they are attention."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.parallel.ring_attention import CudaFlashBlock, PlainBlock, block_for, merge


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("kind", "dtype"), [(CudaFlashBlock, torch.bfloat16), (PlainBlock, torch.float32)])
def test_blocks_are_attention(kind, dtype, heads, groups, device):
    """Queries of 64 tokens, to 32 before them and, causally, to themselves."""
    if device == "cpu":
        pytest.skip("these blocks are a GPU's")
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    query, gradient = torch.randn(2, 2, heads, 64, 32, **options).unbind(0)
    key, value = torch.randn(2, 2, groups, 96, 32, **options).unbind(0)
    block = block_for(query, "auto")
    assert isinstance(block, kind)
    ends = [(slice(0, 32), False), (slice(32, 96), True)]
    (output, log_sum), later = (block.forward(query, key[:, :, at], value[:, :, at], causal) for at, causal in ends)
    output, log_sum = output.float(), log_sum.clone()
    merge(output, log_sum, *later)
    found = [
        block.backward(gradient, query, key[:, :, at], value[:, :, at], output.to(dtype), log_sum, causal)
        for at, causal in ends
    ]
    ours = [output, found[0][0].float() + found[1][0].float()]
    ours += [torch.cat(parts, 2).float() for parts in list(zip(*found, strict=True))[1:]]

    whole = [t.float().requires_grad_() for t in (query, key, value)]
    seen = torch.ones(64, 96, dtype=torch.bool, device="cuda").tril(32)
    expected = F.scaled_dot_product_attention(*whole, attn_mask=seen, enable_gqa=True)
    expected.backward(gradient.float())
    for a, b in zip(ours, [expected, *(t.grad for t in whole)], strict=True):
        assert (a - b).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * b.norm()
