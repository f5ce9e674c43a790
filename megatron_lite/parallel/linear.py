"""Linear layers split over the tensor axis, and how activations enter and leave them.

A block's sub-layer enters the split region once, runs column-parallel layers, something of its own
per head or per channel, and a row-parallel layer that leaves it (Shoeybi et al. 2019). Sequence
parallelism is a mode of entering and leaving, not another layer (Korthikanti et al. 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.parallel.collectives import (
    Group,
    copy_to,
    gather_sequence,
    reduce_from,
    reduce_scatter_sequence,
    scatter_to,
)
from megatron_lite.parallel.layout import ParameterLayout, replicated, split
from megatron_lite.parallel.process_mesh import ProcessMesh

Activation = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(product, bias or None) to the activation of their sum."""
Unbiased = tuple[torch.Tensor, torch.Tensor | None]
"""What a layer gives whose bias is yet to be added, and that bias."""


@dataclasses.dataclass(frozen=True)
class TensorAxis:
    """The tensor axis as layers use it in one forward pass.

    With `sequence_parallel`, activations [S, B, H] between split regions are parts of the sequence,
    one contiguous part a rank; without it, every rank has them whole.
    """

    mesh: ProcessMesh
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return self.mesh.size("tensor")

    @property
    def rank(self) -> int:
        return self.mesh.rank("tensor")

    @property
    def group(self) -> Group:
        return self.mesh.group("tensor")

    def enter(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The whole sequence, as the input of column-parallel layers; enter once for all that read it."""
        if self.sequence_parallel:
            return gather_sequence(hidden_SBH, self.group)
        return copy_to(hidden_SBH, self.group)

    def leave(self, partial_SBH: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' partial outputs, which are used up."""
        if self.sequence_parallel:
            return reduce_scatter_sequence(partial_SBH, self.group)
        return reduce_from(partial_SBH, self.group)

    def shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """A replicated parameter that acts between split regions: where each rank sees a part of the
        sequence, its gradient is summed over the ranks."""
        return copy_to(parameter, self.group) if self.sequence_parallel else parameter

    def part_of_sequence(self, whole_SBH: torch.Tensor) -> torch.Tensor:
        """What this rank holds between split regions of a tensor that all ranks have whole."""
        return scatter_to(whole_SBH, self.group, 0) if self.sequence_parallel else whole_SBH


def empty_parameter(
    layout: ParameterLayout, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """An uninitialised parameter that carries its layout as `mesh_layout`."""
    parameter = nn.Parameter(torch.empty(layout.local_shape, device=device, dtype=dtype))
    lay_out(parameter, layout)
    return parameter


def lay_out(parameter: nn.Parameter, layout: ParameterLayout) -> None:
    """Say how a parameter lies on the mesh, to us as `mesh_layout` and to DeepSpeed.

    DeepSpeed counts a parameter in the gradient norm on every rank if it is `model_parallel`, on the first one anyway,
    and nowhere (but for ZeRO 3) if it is `ds_pipe_replicated`. So each box is counted once.
    """
    parameter.mesh_layout = layout
    parameter.model_parallel = layout.is_owner
    parameter.ds_pipe_replicated = not layout.is_owner


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are split over tensor ranks: [..., input] -> [..., output / size].

    `sections` are lengths of outputs that are each split (gate and up). With `replicas` r, r neighbouring
    ranks hold the same part (key/value heads fewer than ranks) and the weight's gradient is their sum.
    The input comes from `TensorAxis.enter`. An `activation` is called with the product and the bias, which it adds in
    the same pass. Raises ValueError when the ranks do not divide a section.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        mesh: ProcessMesh,
        *,
        bias: bool,
        sections: tuple[int, ...] | None = None,
        replicas: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place = (0, mesh.rank("tensor"), mesh.size("tensor"))
        weight = split((output_size, input_size), *place, sections=sections, replicas=replicas)
        self.weight = empty_parameter(weight, device=device, dtype=dtype)
        self.bias = None
        if bias:
            layout = split((output_size,), *place, sections=sections, replicas=replicas)
            self.bias = empty_parameter(layout, device=device, dtype=dtype)
        self._replicas = mesh.subgroup("tensor", replicas)

    def forward(self, entered: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        bias = None if self.bias is None else copy_to(self.bias, self._replicas)
        weight = copy_to(self.weight, self._replicas)
        if activation is None:
            return F.linear(entered, weight, bias)
        return activation(F.linear(entered, weight), bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are split over tensor ranks: [S, B, input / size] -> [S, B, output].

    Gives its output, which has left the split region by `axis`, and its bias or None, which is not added: what comes
    next adds it in the same pass. Raises ValueError when the ranks do not divide the input.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        mesh: ProcessMesh,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        rank, size = mesh.rank("tensor"), mesh.size("tensor")
        self.weight = empty_parameter(split((output_size, input_size), 1, rank, size), device=device, dtype=dtype)
        self.bias = None
        if bias:
            self.bias = empty_parameter(replicated((output_size,), rank), device=device, dtype=dtype)

    def forward(self, split_input: torch.Tensor, axis: TensorAxis) -> Unbiased:
        output = axis.leave(F.linear(split_input, self.weight))
        return output, None if self.bias is None else axis.shared(self.bias)
