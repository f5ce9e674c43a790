"""Documents that share the sequences of a forward pass, and attention within each of them.

No mask is ever made: a document is a sequence of its own to the attention kernel, so that work falls with the squares
of documents' lengths. On a GPU one variable-length flash kernel takes all of them (Dao 2023); elsewhere those of about
one length make a block, filled up at their ends, where causality hides what is filled in.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.context import ContextAxis
from megatron_lite.parallel.random import mix, seed_device
from megatron_lite.parallel.ring_attention import SharedDocuments

Attend = Callable[..., torch.Tensor]
"""An attention backend: (query [B, N, S, D], key and value [B, K, S, D], mask, dropout, seed) -> [B, N, S, D]."""

_LEAST_FILLED = 7 / 8
"""Documents share a block if each fills so much of its length."""
_SHORT, _SHORTS_FILLED = 32, 1 / 2
"""And if none is longer than that, and together they fill so much of the block."""


class Documents:
    """Where documents lie in B sequences of S tokens; each is whole, or a piece of one, in one sequence.

    `begins_BS`: bool, on the CPU, true where a document begins. Every sequence begins one.
    """

    def __init__(self, begins_BS: torch.Tensor, device: torch.device):
        batch, length = begins_BS.shape
        begins = begins_BS.clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().flatten()
        self._device = device
        self._batch, self._length = batch, length
        self._first = first
        self.lengths = torch.diff(first, append=first.new_tensor([batch * length]))

    @property
    def is_divided(self) -> bool:
        """Whether a sequence holds more than one."""
        return len(self.lengths) > self._batch

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest."""
        return int(self.lengths.max())

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """int32 [documents + 1], on the device: 0, and where each ends, in sequences laid end to end."""
        return torch.cat((self._first.new_zeros(1), self.lengths.cumsum(0))).int().to(self._device, non_blocking=True)

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The documents by length, out of tokens [S B]."""
        order = self.lengths.argsort(descending=True, stable=True)
        ordered = self.lengths[order].tolist()
        edges, filled = [0], 0
        for at, tokens in enumerate(ordered):
            longest = ordered[edges[-1]]
            filled += tokens
            is_filled = longest <= _SHORT and filled >= _SHORTS_FILLED * longest * (at + 1 - edges[-1])
            if tokens < _LEAST_FILLED * longest and not is_filled:
                edges.append(at)
                filled = tokens
        edges.append(len(ordered))
        shapes, sources, fillings = [], [], []
        for start, stop in itertools.pairwise(edges):
            chosen = order[start:stop]
            shapes.append((stop - start, ordered[start]))
            places = torch.arange(ordered[start]).expand(stop - start, -1)
            last = self.lengths[chosen].unsqueeze(1) - 1
            sequence, first = (self._first[chosen].unsqueeze(1) // self._length, self._first[chosen] % self._length)
            tokens = first.unsqueeze(1) + places.minimum(last)
            sources.append((tokens * self._batch + sequence).flatten())
            fillings.append((places > last).flatten())
        source, filling = torch.cat(sources), torch.cat(fillings)
        place = torch.empty(self._batch * self._length, dtype=torch.int64)
        place[source[~filling]] = (~filling).nonzero().flatten()
        where = (source, place, filling.nonzero().flatten())
        return Blocks(shapes, *(index.to(self._device, non_blocking=True) for index in where))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Documents of about one length side by side, each filled up to the longest of its block."""

    shapes: Sequence[tuple[int, int]]
    """(documents, tokens of each) of every block."""
    source: torch.Tensor
    """int64 [places of all blocks]: the token there; where a block is filled up, its document's last again."""
    place: torch.Tensor
    """int64 [tokens]: the place of each token."""
    filling: torch.Tensor
    """int64: places that are filled up."""

    def of(self, heads_BNSD: torch.Tensor) -> list[torch.Tensor]:
        """The heads of every block, [documents, N, tokens, D]."""
        return self._divided(_IntoBlocks.apply(_tokens(heads_BNSD), self))

    def of_gradient(self, heads_BNSD: torch.Tensor) -> list[torch.Tensor]:
        """As `of`, zero where blocks are filled up. Not differentiable."""
        return self._divided(self.filled(_tokens(heads_BNSD)))

    def filled(self, tokens: torch.Tensor) -> torch.Tensor:
        """Places of all blocks out of tokens [S B], zero where they are filled up."""
        return tokens.index_select(0, self.source).index_fill_(0, self.filling, 0)

    def _divided(self, places: torch.Tensor) -> list[torch.Tensor]:
        parts = places.split([documents * tokens for documents, tokens in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, blocks: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
        """The inverse of `of`: [B, N, S, D]."""
        places = torch.cat([block.transpose(1, 2).flatten(0, 1) for block in blocks])
        return _OutOfBlocks.apply(places, self).unflatten(0, (-1, batch)).permute(1, 2, 0, 3)


def _tokens(heads_BNSD: torch.Tensor) -> torch.Tensor:
    """[S B, N, D]."""
    return heads_BNSD.permute(2, 0, 1, 3).flatten(0, 1)


class _IntoBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, blocks):
        ctx.blocks = blocks
        return tokens.index_select(0, blocks.source)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Of what is filled in no query's result is read, so there is no gradient to add.
        return gradient.index_select(0, ctx.blocks.place), None


class _OutOfBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, places, blocks):
        ctx.blocks = blocks
        return places.index_select(0, blocks.place)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.blocks.filled(gradient), None


def documents_of(
    begins_BS: torch.Tensor, context: ContextAxis, device: torch.device
) -> Documents | SharedDocuments | None:
    """Documents of whole sequences as attention takes them, on a ring as `ring_attention` does; None where no sequence
    holds more than one."""
    documents = Documents(begins_BS, device)
    if not documents.is_divided:
        return None
    if not context.is_ring:
        return documents
    begins_here = context.part(begins_BS, 1).clone()
    begins_here[:, begins_here.shape[1] // 2] = True
    return SharedDocuments(begins_BS, Documents(begins_here, device).blocks, context.rank, context.size)


def attend_in_blocks(
    attend: Attend,
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    documents: Documents,
    dropout_probability: float,
    seed: int | None,
) -> torch.Tensor:
    """Causal attention within each document by an attention backend, block by block: [B, N, S, D].

    Dropout masks are functions of `seed` and the place of a document among those of the forward pass.
    """
    blocks = documents.blocks
    heads = (blocks.of(heads) for heads in (query_BNSD, key_BKSD, value_BKSD))
    mixed = [
        attend(*block, None, dropout_probability, None if seed is None else mix(seed, number))
        for number, block in enumerate(zip(*heads, strict=True))
    ]
    return blocks.join(mixed, query_BNSD.shape[0])


def attend_by_lengths(
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    documents: Documents,
    dropout_probability: float,
    seed: int | None,
) -> torch.Tensor:
    """As `attend_in_blocks`, by torch's variable-length flash attention, where `has_gpu_flash`."""
    if seed is not None:
        seed_device(query_BNSD.device, seed)
    packed = (heads.transpose(1, 2).flatten(0, 1) for heads in (query_BNSD, key_BKSD, value_BKSD))
    lengths = documents.ends, documents.ends, documents.longest, documents.longest
    mixed, *_ = torch.ops.aten._flash_attention_forward(
        *packed, *lengths, 0.0 if seed is None else dropout_probability, is_causal=True, return_debug_mask=False
    )
    return mixed.unflatten(0, (query_BNSD.shape[0], -1)).transpose(1, 2)
