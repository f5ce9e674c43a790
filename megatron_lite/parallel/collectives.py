"""Collectives that autograd knows, each beside its conjugate: the backward of one is the other.

    copy_to                  identity              <->  reduce_from              all-reduce
    scatter_to               keep my part          <->  gather_from              all-gather
    gather_sequence          all-gather along S    <->  reduce_scatter_sequence  reduce-scatter along S
    sequence_to_heads        all-to-all            <->  heads_to_sequence        all-to-all

All ranks of `group` call them in the same order. `group` None stands for an axis of size 1: the
argument is returned as it is, without a node in the graph. The pairs are Megatron-LM's f and g
(Shoeybi et al. 2019), their sequence-parallel forms (Korthikanti et al. 2022), and the exchange of
DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.whereabouts import HERE

# Renamed in torch 2.13, where the old names warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None


def all_reduce(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of `tensor` over the group, written in place if contiguous. Not differentiable."""
    if group is None:
        return tensor
    tensor = tensor.contiguous()
    with HERE.waiting():
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: torch.Tensor, group: Group, dim: int = 0) -> torch.Tensor:
    """The group's tensors, joined along `dim` in rank order. Not differentiable."""
    if group is None:
        return tensor
    size = group.size()
    parts = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:])) if tensor.dim() else tensor.new_empty(size)
    with HERE.waiting():
        _all_gather_single(parts, tensor.contiguous(), group=group)
    return parts if dim == 0 else torch.cat(parts.chunk(size), dim)


def reduce_scatter(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's part along dim 0 of the group's sum. Not differentiable."""
    if group is None:
        return tensor
    tensor = tensor.contiguous()
    part = tensor.new_empty((_even(tensor.shape[0], group), *tensor.shape[1:]))
    _reduce_scatter_into(part, tensor, group)
    return part


def reduce_scatter_in_place(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """As `reduce_scatter`, written over `my_part` of a contiguous `tensor`, which is used up."""
    part = my_part(tensor, group, 0)
    if group is not None:
        _reduce_scatter_into(part, tensor, group)
    return part


def _reduce_scatter_into(part: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """`part` may be this rank's part of `tensor` itself."""
    if tensor.device.type != "cpu":
        with HERE.waiting():
            _reduce_scatter_single(part, tensor, group=group)
        return
    # gloo's own sums everything everywhere, in more than twice the time.
    rank, size = group.rank(), group.size()
    parts = tensor.chunk(size)
    received = torch.empty_like(part)
    mine = parts[rank]
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        with HERE.waiting("its part of a reduce-scatter", dist.get_global_rank(group, source)):
            sending = dist.isend(parts[target], group=group, group_dst=target)
            dist.recv(received, group=group, group_src=source)
            sending.wait()
        mine = torch.add(mine, received, out=part)


def all_to_all(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """Entry i of `parts` goes to rank i; what comes from rank i becomes entry i. Not differentiable."""
    if group is None:
        return parts
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    with HERE.waiting():
        dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def my_part(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """A view of this rank's even part along `dim`."""
    if group is None:
        return tensor
    length = _even(tensor.shape[dim], group)
    return tensor.narrow(dim, group.rank() * length, length)


def _even(length: int, group: dist.ProcessGroup) -> int:
    if length % group.size():
        raise ValueError(f"a dim of {length} cannot be split evenly over {group.size()} ranks")
    return length // group.size()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Autograd may hand the same gradient to another branch, so it is not summed in place.
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.mark_dirty(tensor)
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Conjugate(torch.autograd.Function):
    """One exchange forward and another one backward, each a function of a tensor and its group."""

    @staticmethod
    def forward(ctx, tensor, group, there, back):
        ctx.group, ctx.back = group, back
        return there(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.back(gradient, ctx.group), None, None, None


def _along(dim: int) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Keeping my part along `dim`, and gathering all."""
    return (lambda tensor, group: my_part(tensor, group, dim).contiguous()), partial(all_gather, dim=dim)


def _all_tokens(part_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    by_rank = part_SBND.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return all_to_all(by_rank, group).flatten(0, 1)


def _all_heads(whole_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    by_rank = whole_SBND.unflatten(0, (group.size(), -1))
    return all_to_all(by_rank, group).movedim(0, 2).flatten(2, 3)


def copy_to(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """`tensor`, equal on all ranks, as the input of something they share; its gradient is summed."""
    return tensor if group is None else _CopyTo.apply(tensor, group)


def reduce_from(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of the ranks' `tensor`s, equal on all of them. Works in place: `tensor` is used up."""
    return tensor if group is None else _ReduceFrom.apply(tensor.contiguous(), group)


def scatter_to(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """This rank's part along `dim` of a `tensor` equal on all ranks; its gradient is gathered.

    Raises ValueError when the group does not divide the dim.
    """
    return tensor if group is None else _Conjugate.apply(tensor, group, *_along(dim))


def gather_from(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """The ranks' parts joined along `dim`, equal on all of them; each keeps its part of the gradient,
    which is equal on all ranks too."""
    return tensor if group is None else _Conjugate.apply(tensor, group, *reversed(_along(dim)))


def gather_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The whole sequence from its parts along dim 0, as the input of something the ranks share; its
    gradient is summed and split."""
    return tensor if group is None else _Conjugate.apply(tensor, group, all_gather, reduce_scatter)


def reduce_scatter_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's part along dim 0 of the sum of the ranks' `tensor`s; its gradient is gathered.

    Raises ValueError when the group does not divide the dim.
    """
    return tensor if group is None else _Conjugate.apply(tensor, group, reduce_scatter, all_gather)


def sequence_to_heads(part_SBND: torch.Tensor, group: Group) -> torch.Tensor:
    """All ranks' parts of the sequence, one behind the other, of this rank's share of the heads:
    [S, B, N, D] -> [S c, B, N / c, D] over c ranks, which divide N."""
    return part_SBND if group is None else _Conjugate.apply(part_SBND, group, _all_tokens, _all_heads)


def heads_to_sequence(whole_SBND: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's part of the sequence, of all heads: the inverse of `sequence_to_heads`."""
    return whole_SBND if group is None else _Conjugate.apply(whole_SBND, group, _all_heads, _all_tokens)
