"""A sequence shared by context ranks: its parts, and attention over them against attention of one rank."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks

from megatron_lite.model.attention import ATTENTION_BACKENDS
from megatron_lite.model.documents import attend_in_blocks, documents_of
from megatron_lite.parallel.context import ContextAxis
from megatron_lite.parallel.ring_attention import ring_attention

BATCH, LENGTH, WIDTH = 2, 32, 8
CPU = torch.device("cpu")
HEADS = ((4, 4), (4, 2), (8, 1))


class _Place:
    """A group by its place alone."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def test_parts_are_zigzag():
    whole = torch.arange(12)
    parts = [ContextAxis(_Place(rank, 3)).part(whole, 0).tolist() for rank in range(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="sequence of 10 cannot be cut into 2 x 2 chunks"):
        ContextAxis(_Place(0, 2)).part(torch.arange(10), 0)
    assert ContextAxis().part(whole, 0) is whole and ContextAxis().join(whole, 0) is whole


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_spans_say_where_tokens_are(parts):
    """Whatever contiguous share of its tokens a tensor rank has."""
    for rank in range(3):
        axis = ContextAxis(_Place(rank, 3))
        mine = axis.part(torch.arange(48), 0).tolist()
        share = len(mine) // parts
        for first in range(0, len(mine), share):
            spans = axis.spans(first, first + share, len(mine))
            assert [i for length, at in spans for i in range(at, at + length)] == mine[first : first + share]
    assert ContextAxis().spans(3, 7, 16) == [(4, 3)]


def _apart(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.norm()).item()


WHOLE = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
STARTS = (
    # Of two sequences: within chunks and at their ends; over several; at each token; by chance.
    ([0, 1, 3, 8, 15, 16, 24, 31], [0, 9]),
    ([0, 2, 29], [0]),
    ([0, 7, 25], range(32)),
    ([0, 4, 5, 12, 20, 28], [0, 3, 13, 14, 22, 23, 27, 30]),
)


def _begins(starts):
    begins = WHOLE.clone()
    for row, places in zip(begins, starts, strict=True):
        row[list(places)] = True
    return begins


def _attend(exchange, backend, dtype, starts=None):
    """Relative distances of output and gradients from those of one rank, for each number of heads."""
    axis, generator = ContextAxis(dist.group.WORLD, exchange), torch.Generator().manual_seed(0)
    begins, found = WHOLE if starts is None else _begins(starts), []
    documents = documents_of(begins, axis, CPU)
    for heads, groups in HEADS:
        query, key, value, weight = (
            torch.randn(LENGTH, BATCH, n, WIDTH, generator=generator) for n in (heads, groups, groups, heads)
        )
        whole = [t.to(dtype).float().requires_grad_() for t in (query, key, value)]
        # In float64, under the dense mask.
        numbers = begins.cumsum(1)
        seen = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()
        expected = F.scaled_dot_product_attention(
            *(t.permute(1, 2, 0, 3).double() for t in whole), attn_mask=seen, enable_gqa=True
        ).permute(2, 0, 1, 3)
        expected.backward(weight)
        parts = [axis.part(t.detach(), 0).to(dtype).requires_grad_() for t in whole]
        entered = [axis.to_heads(part).permute(1, 2, 0, 3) for part in parts]
        if exchange == "p2p":
            mixed = ring_attention(*entered, axis.group, backend, documents)
        elif documents is None:
            mixed = F.scaled_dot_product_attention(*entered, is_causal=True, enable_gqa=True)
        else:
            mixed = attend_in_blocks(ATTENTION_BACKENDS[backend], *entered, documents, 0.0, None)
        mixed = axis.to_sequence(mixed.permute(2, 0, 1, 3))
        mixed.backward(axis.part(weight, 0).to(dtype))
        assert torch.equal(axis.join(axis.part(weight, 0), 0), weight)
        found.append(_apart(mixed.float(), axis.part(expected, 0)))
        found += [_apart(p.grad.float(), axis.part(t.grad, 0)) for p, t in zip(parts, whole, strict=True)]
    return found


@pytest.mark.parametrize(("exchange", "backend"), [("p2p", "auto"), ("p2p", "fused_softmax"), ("a2a", "auto")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_shared_sequences(ranks, exchange, backend):
    for found in run_on_ranks(_attend, ranks, exchange, backend, torch.float32):
        assert len(found) == 12 and max(found) < 1e-5, found


def _attend_within(exchange, backend, dtype):
    return [_attend(exchange, backend, dtype, starts) for starts in STARTS]


@pytest.mark.parametrize(("exchange", "backend"), [("p2p", "auto"), ("p2p", "fused_softmax"), ("a2a", "auto")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_within_documents_is_that_under_the_dense_mask(ranks, exchange, backend):
    for found in run_on_ranks(_attend_within, ranks, exchange, backend, torch.float32):
        assert all(len(each) == 12 and max(each) < 1e-5 for each in found), found
    if exchange == "p2p" and ranks == 2:
        for found in run_on_ranks(_attend_within, ranks, exchange, backend, torch.bfloat16):
            assert max(map(max, found)) < 2e-2, found


@pytest.mark.parametrize("backend", ["auto", "fused_softmax"])
def test_attention_in_bf16_rounds_and_no_more(backend):
    for found in run_on_ranks(_attend, 2, "p2p", backend, torch.bfloat16):
        assert max(found) < 1e-2, found


def _too_few_heads():
    axis = ContextAxis(dist.group.WORLD, "a2a")
    with pytest.raises(ValueError, match="3 heads cannot be shared out over 2 context ranks"):
        axis.to_heads(torch.zeros(4, 1, 3, 2))


def test_heads_that_cannot_be_shared_out_are_refused():
    run_on_ranks(_too_few_heads, 2)
