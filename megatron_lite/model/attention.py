"""Causal self-attention, with grouped key/value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite import log
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.kernels.softmax import causal_softmax, masked_softmax
from megatron_lite.model.documents import Attend, Documents, attend_by_lengths, attend_in_blocks
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.model.norm import HeadNorm
from megatron_lite.parallel.linear import ColumnParallelLinear, RowParallelLinear, Unbiased
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.random import dropout, seed_device
from megatron_lite.parallel.recompute import recomputed
from megatron_lite.parallel.ring_attention import has_gpu_flash, ring_attention


class Attention(nn.Module):
    """Causal self-attention: [S, B, H] -> [S, B, H] and a bias to add, heads split over tensor ranks.

    `query.weight` is [N D, H], `key_value.weight` [2 K D, H] with all keys first, `output.weight`
    [H, N D]. Where tensor ranks outnumber key/value heads, neighbours hold the same one. With `qk_layernorm` each
    query and key is normed by `query_norm` and `key_norm`, of [D]. Raises ValueError where heads cannot be shared out
    whole. Grouped key/value heads: Ainslie et al. 2023.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        layer: int,
        kernels: KernelsConfig,
        *,
        recompute_core: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        queries, groups, ranks = config.num_attention_heads, config.kv_heads, mesh.size("tensor")
        if queries % groups or queries % ranks or (groups % ranks and ranks % groups):
            raise ValueError(
                f"{queries} query heads and {groups} key/value heads cannot be shared out whole over {ranks} ranks"
            )
        self._layer = layer
        self._head_dim = config.head_dim
        self._dropout = config.attention_dropout
        self._backend = kernels.attention_backend
        self._recompute_core = recompute_core
        query_width = queries * config.head_dim
        group_width = groups * config.head_dim
        options = {"device": device, "dtype": dtype}
        self.query = ColumnParallelLinear(
            config.hidden_size, query_width, mesh, bias=config.has_qkv_bias, sections=(query_width,), **options
        )
        self.key_value = ColumnParallelLinear(
            config.hidden_size,
            2 * group_width,
            mesh,
            bias=config.has_qkv_bias,
            sections=(group_width, group_width),
            replicas=max(1, ranks // groups),
            **options,
        )
        self.query_norm = self.key_norm = None
        if config.qk_layernorm:
            self.query_norm, self.key_norm = (HeadNorm(config, mesh, kernels, **options) for _ in range(2))
        self.output = RowParallelLinear(query_width, config.hidden_size, mesh, bias=config.add_bias_linear, **options)

    def forward(self, hidden_SBH: torch.Tensor, run: ForwardPass) -> Unbiased:
        entered = run.axis.enter(hidden_SBH)
        query_SBND = self.query(entered).unflatten(-1, (-1, self._head_dim))
        key_SBKD, value_SBKD = self.key_value(entered).unflatten(-1, (2, -1, self._head_dim)).unbind(-3)
        if self.query_norm is not None:
            query_SBND, key_SBKD = self.query_norm(query_SBND, run.axis), self.key_norm(key_SBKD, run.axis)
        if run.rotation is not None:
            query_SBND, key_SBKD = run.rotation(query_SBND), run.rotation(key_SBKD)
        query, key, value = (
            run.context.to_heads(heads).permute(1, 2, 0, 3) for heads in (query_SBND, key_SBKD, value_SBKD)
        )
        if run.cache is not None:
            key, value = run.cache.append(self._layer, key, value)
        # A ring's backward makes probabilities anew by itself.
        if self._recompute_core and not run.context.is_ring:
            mixed_BNSD = recomputed(self._core, query, key, value, run)
        else:
            mixed_BNSD = self._core(query, key, value, run)
        mixed_SBND = run.context.to_sequence(mixed_BNSD.permute(2, 0, 1, 3))
        return self.output(mixed_SBND.flatten(2), run.axis)

    def _core(
        self, query_BNSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, run: ForwardPass
    ) -> torch.Tensor:
        if run.context.is_ring:
            if run.drops(self._dropout):
                raise ValueError("ring attention has no probabilities to drop")
            heads = query_BNSD, key_BKSD, value_BKSD
            return ring_attention(*heads, run.context.group, self._backend, run.documents)
        seed = run.seed(self._layer, Site.ATTENTION_PROBABILITIES, differs=True) if self._dropout else None
        attend = ATTENTION_BACKENDS[self._backend]
        if run.documents is not None:
            return self._within_documents(attend, query_BNSD, key_BKSD, value_BKSD, run.documents, seed)
        return attend(query_BNSD, key_BKSD, value_BKSD, run.mask, self._dropout, seed)

    def _within_documents(
        self,
        attend: Attend,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        documents: Documents,
        seed: int | None,
    ) -> torch.Tensor:
        heads = query_BNSD, key_BKSD, value_BKSD
        if self._backend != "fused_softmax" and has_gpu_flash(query_BNSD):
            return attend_by_lengths(*heads, documents, self._dropout, seed)
        if query_BNSD.device.type != "cpu":
            log.once(
                f"documents are attended to in blocks of about one length: variable-length flash attention takes no "
                f"{query_BNSD.dtype} heads of {query_BNSD.shape[-1]} values with --attention-backend {self._backend} "
                "on this device"
            )
        return attend_in_blocks(attend, *heads, documents, self._dropout, seed)


def sdpa(
    query_BNSD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_probability: float,
    seed: int | None,
) -> torch.Tensor:
    """Attention of the last S of L tokens by torch's scaled_dot_product_attention: [B, N, S, D].

    `mask` is true for what a query sees, [B or 1, 1, S, L]; without it causality alone decides. A `seed` of None is no
    dropout. Where torch has a flash or memory-efficient kernel, the square S x L is never in memory.
    """
    if seed is not None:
        seed_device(query_BNSD.device, seed)
    return F.scaled_dot_product_attention(
        query_BNSD,
        key_BKLD,
        value_BKLD,
        attn_mask=mask,
        # Torch aligns its causal mask at the first key; a single decoded token sees every key.
        is_causal=mask is None and query_BNSD.shape[2] == key_BKLD.shape[2],
        dropout_p=0.0 if seed is None else dropout_probability,
        enable_gqa=query_BNSD.shape[1] != key_BKLD.shape[1],
    )


def fused_softmax(
    query_BNSD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_probability: float,
    seed: int | None,
) -> torch.Tensor:
    """As `sdpa`, by two matrix products around the softmax kernel, which scales and masks: [B, N, S, D].

    All probabilities are in memory, and kept for the backward pass (Shoeybi et al. 2019). The query heads of a
    group are more rows of one product, so that keys and values are not repeated.
    """
    length, scale = query_BNSD.shape[2], query_BNSD.shape[3] ** -0.5
    rows = query_BNSD.unflatten(1, (key_BKLD.shape[1], -1)).flatten(2, 3)
    scores = (rows @ key_BKLD.transpose(-1, -2)).unflatten(2, (-1, length))
    if mask is None:
        probabilities = causal_softmax(scores, scale)
    else:
        probabilities = masked_softmax(scores, ~mask.unsqueeze(1), scale)
    probabilities = dropout(probabilities, dropout_probability, seed)
    mixed = probabilities.flatten(2, 3) @ value_BKLD
    return mixed.unflatten(2, (-1, length)).flatten(1, 2)


def auto(
    query_BNSD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_probability: float,
    seed: int | None,
) -> torch.Tensor:
    """`sdpa`, which has a kernel without the square for every case but one: dropout on a CPU, where torch keeps
    three squares in fp32 and `fused_softmax` is faster (1.3 to 1.7 times in fp32, 2 to 6 times in bf16)."""
    attend = fused_softmax if seed is not None and query_BNSD.device.type == "cpu" else sdpa
    return attend(query_BNSD, key_BKLD, value_BKLD, mask, dropout_probability, seed)


ATTENTION_BACKENDS = {"auto": auto, "sdpa": sdpa, "fused_softmax": fused_softmax}
