"""Causal self-attention, with grouped key/value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.random import seed_device
from megatron_lite.parallel.recompute import recomputed


class Attention(nn.Module):
    """Causal self-attention: [S, B, H] -> [S, B, H], heads split over tensor ranks.

    `query.weight` is [N D, H], `key_value.weight` [2 K D, H] with all keys first, `output.weight`
    [H, N D]. Where tensor ranks outnumber key/value heads, neighbours hold the same one. Raises
    ValueError where heads cannot be shared out whole. Grouped key/value heads: Ainslie et al. 2023.
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
        self.output = RowParallelLinear(query_width, config.hidden_size, mesh, bias=config.add_bias_linear, **options)

    def forward(self, hidden_SBH: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        entered = run.axis.enter(hidden_SBH)
        query_SBND = self.query(entered).unflatten(-1, (-1, self._head_dim))
        key_SBKD, value_SBKD = self.key_value(entered).unflatten(-1, (2, -1, self._head_dim)).unbind(-3)
        if run.rotation is not None:
            query_SBND, key_SBKD = run.rotation(query_SBND), run.rotation(key_SBKD)
        query, key, value = (heads.permute(1, 2, 0, 3) for heads in (query_SBND, key_SBKD, value_SBKD))
        if run.cache is not None:
            key, value = run.cache.append(self._layer, key, value)
        if self._recompute_core:
            mixed_BNSD = recomputed(self._core, query, key, value, run)
        else:
            mixed_BNSD = self._core(query, key, value, run)
        return self.output(mixed_BNSD.permute(2, 0, 1, 3).flatten(2), run.axis)

    def _core(
        self, query_BNSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, run: ForwardPass
    ) -> torch.Tensor:
        seed = run.seed(self._layer, Site.ATTENTION_PROBABILITIES, differs=True) if self._dropout else None
        if seed is not None:
            seed_device(query_BNSD.device, seed)
        return F.scaled_dot_product_attention(
            query_BNSD,
            key_BKSD,
            value_BKSD,
            attn_mask=run.mask,
            # Torch aligns its causal mask at the first key; a single decoded token sees every key.
            is_causal=run.mask is None and query_BNSD.shape[2] == key_BKSD.shape[2],
            dropout_p=0.0 if seed is None else self._dropout,
            enable_gqa=query_BNSD.shape[1] != key_BKSD.shape[1],
        )
