"""Each collective against its formula, and its backward against its conjugate's forward."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_lite.parallel import collectives
from megatron_lite.parallel.collectives import (
    copy_to,
    gather_from,
    gather_sequence,
    heads_to_sequence,
    reduce_from,
    reduce_scatter_sequence,
    scatter_to,
    sequence_to_heads,
)

SIZE = 4


def _values(rank, dtype):
    return (torch.arange(8 * 12, dtype=torch.float32).reshape(8, 12) % 7 + rank).to(dtype)


def _check_all():
    group, rank = dist.group.WORLD, dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16):
        everyone = [_values(r, dtype) for r in range(SIZE)]
        total = sum(everyone)
        part = slice(2 * rank, 2 * rank + 2)
        columns = slice(3 * rank, 3 * rank + 3)
        # The same numbers as [S, B, N, D]: 8 tokens, 12 heads of width 1.
        by_heads = everyone[0].view(8, 1, 12, 1)

        cases = {
            # name: (function, input, expected output, gradient of rank r, expected gradient of the input)
            "copy_to": (lambda x: copy_to(x, group), everyone[0], everyone[0], _values, total),
            "reduce_from": (lambda x: reduce_from(x * 1, group), everyone[rank], total, _same, everyone[0]),
            "scatter_to": (
                lambda x: scatter_to(x, group, 1),
                everyone[0],
                everyone[0][:, columns],
                lambda r, d: _values(0, d)[:, 3 * r : 3 * r + 3],
                everyone[0],
            ),
            "gather_from": (
                lambda x: gather_from(x, group, 1),
                everyone[0][:, columns],
                everyone[0],
                _same,
                everyone[0][:, columns],
            ),
            "gather_sequence": (
                lambda x: gather_sequence(x, group),
                everyone[0][part],
                everyone[0],
                _values,
                total[part],
            ),
            "reduce_scatter_sequence": (
                lambda x: reduce_scatter_sequence(x, group),
                everyone[rank],
                total[part],
                lambda r, d: _values(0, d)[2 * r : 2 * r + 2],
                everyone[0],
            ),
            "sequence_to_heads": (
                lambda x: sequence_to_heads(x, group),
                by_heads[part],
                by_heads[:, :, columns],
                lambda r, d: _values(0, d).view(8, 1, 12, 1)[:, :, 3 * r : 3 * r + 3],
                by_heads[part],
            ),
            "heads_to_sequence": (
                lambda x: heads_to_sequence(x, group),
                by_heads[:, :, columns],
                by_heads[part],
                lambda r, d: _values(0, d).view(8, 1, 12, 1)[2 * r : 2 * r + 2],
                by_heads[:, :, columns],
            ),
        }
        for name, (function, value, expected, gradient, expected_gradient) in cases.items():
            leaf = value.clone().requires_grad_()
            output = function(leaf)
            assert output.dtype == dtype and torch.equal(output, expected), name
            output.backward(gradient(rank, dtype))
            assert torch.equal(leaf.grad, expected_gradient), name

        whole = _values(rank, dtype)
        mine = collectives.reduce_scatter_in_place(whole, group)
        assert torch.equal(mine, total[part]) and mine.data_ptr() == whole[part].data_ptr()

    # A residual branch receives the very gradient tensor that copy_to's backward sums.
    leaf = torch.ones(3, requires_grad=True)
    moved = leaf * 1
    (copy_to(moved, group) + moved).backward(torch.ones(3))
    assert torch.equal(leaf.grad, torch.full((3,), SIZE + 1.0))

    with pytest.raises(ValueError, match="a dim of 7 cannot be split evenly over 4 ranks"):
        scatter_to(torch.ones(7), group, 0)


def _same(rank, dtype):
    return _values(0, dtype)


def test_collectives_and_their_conjugates():
    run_on_ranks(_check_all, SIZE)


def test_on_an_axis_of_size_one_the_argument_comes_back():
    value = torch.ones(4, 4, requires_grad=True)
    for function in (
        *(copy_to, reduce_from, gather_sequence, reduce_scatter_sequence),
        *(sequence_to_heads, heads_to_sequence, collectives.all_to_all),
    ):
        assert function(value, None) is value
    assert scatter_to(value, None, 0) is value and gather_from(value, None, 1) is value
    for function in (
        collectives.all_reduce,
        collectives.all_gather,
        collectives.reduce_scatter,
        collectives.reduce_scatter_in_place,
    ):
        assert function(value, None) is value
