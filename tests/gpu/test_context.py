"""Blocks of ring attention on a GPU: merged, they are attention, within documents too."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.model.documents import documents_of
from megatron_lite.parallel import ring_attention as ring
from megatron_lite.parallel.context import ContextAxis
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


class _Alone:
    """The group of one rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


class _Back:
    """What is sent comes back."""

    def __init__(self, tensor, group):
        self._tensor = tensor

    def wait(self):
        return self._tensor


@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "auto"), (torch.float32, "fused_softmax")])
def test_documents_over_two_chunks_are_those_of_the_dense_mask(dtype, backend, device, monkeypatch):
    """On a ring of one rank: pieces of both chunks, and the document that crosses from one to the other."""
    monkeypatch.setattr(ring, "_Passing", _Back)
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    leaves = [torch.randn(96, 3, heads, 32, **options).permute(1, 2, 0, 3).requires_grad_() for heads in (4, 2, 2)]
    begins = torch.zeros(3, 96, dtype=torch.bool)
    begins[0, [5, 6, 40, 70]] = begins[1, [48, 90]] = True
    axis = ContextAxis(_Alone())
    output = ring.ring_attention(*leaves, axis.group, backend, documents_of(begins, axis, leaves[0].device))
    gradient = torch.randn_like(output)
    ours = [output, *torch.autograd.grad(output, leaves, gradient)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    numbers = begins.cumsum(1).to(device)
    seen = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen, enable_gqa=True)
    for a, b in zip(ours, [expected, *torch.autograd.grad(expected, exact, gradient.double())], strict=True):
        assert (a - b).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * b.norm()
