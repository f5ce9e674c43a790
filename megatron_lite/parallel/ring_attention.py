"""Causal attention over a sequence that lies zigzag on the ranks of a ring (see `context`).

Each rank keeps its queries; keys and values travel, while what has arrived is attended to. The results of blocks are
merged by their log-sum-exp in fp32. Backward makes probabilities anew from it, and gradients of keys and values
travel with them, in fp32 (Liu et al. 2023; the zigzag is that of Megatron-LM's context parallelism).

Documents need no mask: at most one crosses from a chunk to a later one, and all of its queries there see all of its
keys here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_lite import log
from megatron_lite.parallel.whereabouts import HERE


class Block(Protocol):
    """Attention of some queries [B, N, S, D] to some keys and values [B, K, L, D], scaled by D^-0.5."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, S, D] and the fp32 log-sum-exp of the scores, [B, N, S]."""

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sum: torch.Tensor,
        is_causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This block's share of the gradients of query, key and value, where `output` and `log_sum` are those of all
        blocks together."""


class PlainBlock:
    """Two matrix products around a softmax in fp32; the square of a block is in memory for a moment."""

    def forward(self, query, key, value, is_causal):
        scores = self._scores(query, key, is_causal)
        log_sum = scores.logsumexp(-1)
        probabilities = torch.exp(scores - log_sum.unsqueeze(-1))
        return _heads(probabilities.to(value.dtype) @ value, query), _heads(log_sum.unsqueeze(-1), query).squeeze(-1)

    def backward(self, gradient, query, key, value, output, log_sum, is_causal):
        groups = key.shape[1]
        rows, gradient_rows = _rows(query, groups), _rows(gradient, groups)
        delta = (gradient_rows.float() * _rows(output, groups).float()).sum(-1, keepdim=True)
        probabilities = torch.exp(self._scores(query, key, is_causal) - _rows(log_sum.unsqueeze(-1), groups))
        scores_gradient = (gradient_rows @ value.transpose(-1, -2)).float().sub_(delta).mul_(probabilities)
        scores_gradient = scores_gradient.mul_(query.shape[-1] ** -0.5).to(query.dtype)
        return (
            _heads(scores_gradient @ key, query),
            scores_gradient.transpose(-1, -2) @ rows,
            probabilities.to(value.dtype).transpose(-1, -2) @ gradient_rows,
        )

    def _scores(self, query, key, is_causal):
        scores = (_rows(query, key.shape[1]) @ key.transpose(-1, -2)).float().mul_(query.shape[-1] ** -0.5)
        if is_causal:
            later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu_(1)
            scores.unflatten(2, (-1, query.shape[2])).masked_fill_(later, -torch.inf)
        return scores


def _rows(heads_BNSD: torch.Tensor, groups: int) -> torch.Tensor:
    """The query heads of each group as more rows of one product: [B, K, N / K S, D]."""
    return heads_BNSD.unflatten(1, (groups, -1)).flatten(2, 3)


def _heads(rows: torch.Tensor, like_BNSD: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(2, (-1, like_BNSD.shape[2])).flatten(1, 2)


class CpuFlashBlock:
    """Torch's flash attention for a CPU."""

    def forward(self, query, key, value, is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)

    def backward(self, gradient, query, key, value, output, log_sum, is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, output, log_sum, 0.0, is_causal
        )


class CudaFlashBlock:
    """Torch's flash attention for a GPU (Dao 2023), of 16-bit heads of a multiple of 8 values."""

    def forward(self, query, key, value, is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[:2]

    def backward(self, gradient, query, key, value, output, log_sum, is_causal):
        # State of the random generator, which without dropout nobody reads.
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient,
            query,
            key,
            value,
            output,
            log_sum.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            is_causal,
            state,
            state[0],
        )


def has_gpu_flash(heads: torch.Tensor) -> bool:
    """Whether torch has flash attention for such heads [..., D] on a GPU, called by itself."""
    fits = heads.dtype != torch.float32 and heads.shape[-1] % 8 == 0 and heads.shape[-1] <= 256
    return heads.device.type == "cuda" and fits and torch.cuda.get_device_capability(heads.device) >= (8, 0)


def block_for(query: torch.Tensor, backend: str) -> Block:
    """What computes a block of heads like `query` under that --attention-backend."""
    if backend == "fused_softmax":
        return PlainBlock()
    if query.device.type == "cpu":
        return CpuFlashBlock()
    if has_gpu_flash(query):
        return CudaFlashBlock()
    log.once(
        f"ring attention of {query.dtype} heads of {query.shape[-1]} values has no flash kernel on this device, and "
        "runs as matrix products around a softmax"
    )
    return PlainBlock()


class Pieces(Protocol):
    """The pieces of documents within chunks, as sequences side by side, filled up at their ends."""

    def of(self, heads_BNSD: torch.Tensor) -> list[torch.Tensor]:
        """The heads of pieces of about one length, [pieces, N, tokens, D], of each such length."""

    def of_gradient(self, heads_BNSD: torch.Tensor) -> list[torch.Tensor]:
        """As `of`, zero where pieces are filled up."""

    def join(self, blocks: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
        """The inverse of `of`."""


class SharedDocuments:
    """The documents of sequences that lie zigzag on a ring, as one of its ranks sees them.

    `begins_BS`: bool, on the CPU, true where a document begins, of whole sequences; `pieces`: those of this rank's
    chunks, each of which begins one.
    """

    def __init__(self, begins_BS: torch.Tensor, pieces: Pieces, rank: int, size: int):
        self.pieces = pieces
        self._rank, self._size = rank, size
        self._chunk = begins_BS.shape[1] // (2 * size)
        places = torch.arange(begins_BS.shape[1])
        # Where the document of each token begins, and where another begins, from that token on.
        start = torch.where(begins_BS, places, 0).cummax(1).values
        stop = torch.where(begins_BS, places, len(places)).flip(1).cummin(1).values.flip(1)
        firsts = [chunk * self._chunk for chunk in self._chunks(rank)]
        self._crossing = list(zip(start[:, firsts].tolist(), stop[:, firsts].tolist(), strict=True))

    def _chunks(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self._size - 1 - rank

    def visible(self, theirs: int) -> list[tuple[slice, slice, slice]]:
        """Sequence, this rank's queries, and the keys of earlier chunks that all of them see, on rank `theirs`."""
        chunk, found = self._chunk, []
        for sequence, crossing in enumerate(self._crossing):
            for place, (own, start, stop) in enumerate(zip(self._chunks(self._rank), *crossing, strict=True)):
                rows = min(stop - own * chunk, chunk)
                seen = [
                    (at * chunk + max(start - chunk * other, 0), (at + 1) * chunk)
                    for at, other in enumerate(self._chunks(theirs))
                    if other < own and start < chunk * (other + 1)
                ]
                if rows and seen:
                    # Of two chunks the later is seen whole, and follows.
                    columns = slice(seen[0][0], seen[-1][1])
                    found.append((slice(sequence, sequence + 1), slice(place * chunk, place * chunk + rows), columns))
        return found


def ring_attention(
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    group: dist.ProcessGroup,
    backend: str,
    documents: SharedDocuments | None = None,
) -> torch.Tensor:
    """Causal attention of this rank's queries to the whole sequence: [B, N, S, D] of the zigzag part on this rank.

    Keys and values, K heads of them, may be fewer than N. `backend` is an --attention-backend. With `documents` a query
    sees no further than its own.
    """
    return _Ring.apply(query_BNSD, key_BKSD, value_BKSD, group, block_for(query_BNSD, backend), documents)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, group, block, documents):
        mine, size = group.rank(), group.size()
        own = pair = torch.stack((key, value))
        arriving = _Passing(pair, group)
        output, log_sum = _forward_within(block, query, *pair, documents)
        output, log_sum = output.float(), log_sum.clone()
        for distance in range(size):
            if distance:
                pair = arriving.wait()
                if distance < size - 1:
                    arriving = _Passing(pair, group)
            for batch, rows, columns in _visible(mine, (mine - distance) % size, query.shape[2] // 2, documents):
                part = block.forward(query[batch, :, rows], *pair[:, batch, :, columns], False)
                merge(output[batch, :, rows], log_sum[batch, :, rows], *part)
        output = output.to(query.dtype)
        ctx.group, ctx.block, ctx.documents = group, block, documents
        ctx.save_for_backward(query, own, output, log_sum)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, pair, output, log_sum = ctx.saved_tensors
        group, block, documents = ctx.group, ctx.block, ctx.documents
        mine, size = group.rank(), group.size()
        query_gradient = torch.zeros_like(query, dtype=torch.float32)
        pair_gradient = torch.zeros_like(pair, dtype=torch.float32)
        travelling = None
        for distance in range(size):
            arriving = _Passing(pair, group) if distance < size - 1 else None
            found = []
            if distance == 0:
                parts = _backward_within(block, gradient, query, *pair, output, log_sum, documents)
                found.append((slice(None), slice(None), slice(None), parts))
            for batch, rows, columns in _visible(mine, (mine - distance) % size, query.shape[2] // 2, documents):
                parts = block.backward(
                    gradient[batch, :, rows],
                    query[batch, :, rows],
                    *pair[:, batch, :, columns],
                    output[batch, :, rows],
                    log_sum[batch, :, rows],
                    False,
                )
                found.append((batch, rows, columns, parts))
            if travelling is not None:
                pair_gradient = travelling.wait()
            for batch, rows, columns, (of_query, *of_pair) in found:
                query_gradient[batch, :, rows] += of_query
                for total, part in zip(pair_gradient[:, batch, :, columns], of_pair, strict=True):
                    total += part
            travelling = _Passing(pair_gradient, group)
            if arriving is not None:
                pair = arriving.wait()
        pair_gradient = travelling.wait().to(pair.dtype)
        return query_gradient.to(query.dtype), pair_gradient[0], pair_gradient[1], None, None, None


def _forward_within(block, query, key, value, documents):
    """Causal attention of a rank's tokens to each other; with documents, of the tokens of each chunk."""
    if documents is None:
        return block.forward(query, key, value, True)
    pieces, batch = documents.pieces, query.shape[0]
    heads = (pieces.of(heads) for heads in (query, key, value))
    outputs, log_sums = zip(*(block.forward(*each, True) for each in zip(*heads, strict=True)), strict=True)
    log_sum = pieces.join([each.unsqueeze(-1) for each in log_sums], batch).squeeze(-1)
    return pieces.join(outputs, batch), log_sum


def _backward_within(block, gradient, query, key, value, output, log_sum, documents):
    if documents is None:
        return block.backward(gradient, query, key, value, output, log_sum, True)
    pieces = documents.pieces
    heads = [pieces.of_gradient(gradient), *(pieces.of(heads) for heads in (query, key, value, output))]
    heads.append([each.squeeze(-1) for each in pieces.of(log_sum.unsqueeze(-1))])
    gradients = zip(*(block.backward(*each, True) for each in zip(*heads, strict=True)), strict=True)
    return tuple(pieces.join(each, query.shape[0]) for each in gradients)


def _visible(mine: int, theirs: int, half: int, documents: SharedDocuments | None) -> list[tuple[slice, slice, slice]]:
    """Which sequences' queries of rank `mine` see which keys of rank `theirs`, all of the ones all of the others.

    Of an earlier rank the later chunk is behind all queries; a later rank is behind the earlier chunk. What
    `_forward_within` attends to is left out.
    """
    if documents is not None:
        return documents.visible(theirs)
    if theirs == mine:
        return []
    if theirs < mine:
        return [(slice(None), slice(None), slice(0, half))]
    return [(slice(None), slice(half, None), slice(None))]


def merge(output: torch.Tensor, log_sum: torch.Tensor, part: torch.Tensor, part_log_sum: torch.Tensor) -> None:
    """Take a block's result into fp32 `output` and `log_sum`, in place."""
    total = torch.logaddexp(log_sum, part_log_sum)
    output.mul_((log_sum - total).exp_().unsqueeze(-1)).addcmul_(part, (part_log_sum - total).exp_().unsqueeze(-1))
    log_sum.copy_(total)


class _Passing:
    """A tensor on its way to the next rank of the ring, and the previous one's on its way here."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup):
        rank, size = group.rank(), group.size()
        # Held until it is sent.
        self._sent, self._received = tensor, torch.empty_like(tensor)
        self._source = dist.get_global_rank(group, (rank - 1) % size)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> torch.Tensor:
        """The previous rank's tensor."""
        with HERE.waiting("keys and values of the ring", self._source):
            for work in self._works:
                work.wait()
        return self._received
