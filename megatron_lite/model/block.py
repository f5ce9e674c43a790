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
from megatron_lite.parallel.linear import Unbiased
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
            hidden_SBH, _ = self._normal_of_sum(
                self.attention_norm, self.attention(hidden_SBH, run), hidden_SBH, Site.ATTENTION_OUTPUT, run
            )
            hidden_SBH, _ = self._normal_of_sum(
                self.mlp_norm, self.mlp(hidden_SBH, run.axis), hidden_SBH, Site.MLP_OUTPUT, run
            )
            return hidden_SBH
        normal = self.attention_norm(hidden_SBH, run.axis)
        normal, hidden_SBH = self._normal_of_sum(
            self.mlp_norm, self.attention(normal, run), hidden_SBH, Site.ATTENTION_OUTPUT, run
        )
        return self._sum(self.mlp(normal, run.axis), hidden_SBH, Site.MLP_OUTPUT, run)

    def _sum(self, output: Unbiased, residual_SBH: torch.Tensor, site: Site, run: ForwardPass) -> torch.Tensor:
        return run.bias_dropout_add(*output, residual_SBH, self._dropout, self._layer, site)

    def _normal_of_sum(
        self, norm: Norm, output: Unbiased, residual_SBH: torch.Tensor, site: Site, run: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum's norm, and the sum; in one pass where nothing else is between them."""
        output_SBH, bias = output
        if bias is None and not run.drops(self._dropout):
            return norm(output_SBH, run.axis, residual_SBH)
        total_SBH = self._sum(output, residual_SBH, site, run)
        return norm(total_SBH, run.axis), total_SBH
