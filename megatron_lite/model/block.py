"""One transformer layer."""

from __future__ import annotations

import torch
from torch import nn

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.attention import Attention
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.model.mlp import MLP
from megatron_lite.model.norm import Norm
from megatron_lite.parallel.process_mesh import ProcessMesh


class Block(nn.Module):
    """Attention and feed-forward layer, each added to the residual stream: [S, B, H] -> [S, B, H].

    The norm comes before each sub-layer ("pre"), or after each addition ("post", Vaswani et al. 2017).
    `layer` is the layer's number in the whole model.
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
        self._layer = layer
        self._dropout = config.hidden_dropout
        self._post_norm = config.norm_position == "post"
        options = {"device": device, "dtype": dtype}
        self.attention_norm = Norm(config, mesh, kernels, **options)
        self.attention = Attention(config, mesh, layer, kernels, recompute_core=recompute_core, **options)
        self.mlp_norm = Norm(config, mesh, kernels, **options)
        self.mlp = MLP(config, mesh, **options)

    def forward(self, hidden_SBH: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        if self._post_norm:
            added = hidden_SBH + self._drop(self.attention(hidden_SBH, run), Site.ATTENTION_OUTPUT, run)
            hidden_SBH = self.attention_norm(added, run.axis)
            added = hidden_SBH + self._drop(self.mlp(hidden_SBH, run.axis), Site.MLP_OUTPUT, run)
            return self.mlp_norm(added, run.axis)
        normal = self.attention_norm(hidden_SBH, run.axis)
        hidden_SBH = hidden_SBH + self._drop(self.attention(normal, run), Site.ATTENTION_OUTPUT, run)
        normal = self.mlp_norm(hidden_SBH, run.axis)
        return hidden_SBH + self._drop(self.mlp(normal, run.axis), Site.MLP_OUTPUT, run)

    def _drop(self, output_SBH: torch.Tensor, site: Site, run: ForwardPass) -> torch.Tensor:
        return run.dropout(output_SBH, self._dropout, self._layer, site)
