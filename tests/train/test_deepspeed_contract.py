"""What the engine takes from DeepSpeed beyond its documentation: where masters lie, and that writing them counts.

A release of DeepSpeed that moves these things fails here, by name, before it corrupts a checkpoint.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import VOCABULARY, Case, config_of

from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build


def _write_masters(case: Case) -> dict[str, bool]:
    mesh = ProcessMesh.create(MeshShape(data=case.data, tensor=case.tensor))
    config = config_of(case)
    model = build.build_model_to_train(config, mesh, VOCABULARY)
    engine = build.build_engine(config, model, mesh)
    elements = 0
    for piece in engine.pieces(optimizer=False):
        assert piece.tensor.dtype == torch.float32
        # A value that says where in the global tensor it belongs, exact in bf16.
        places = torch.zeros(piece.tensor.shape)
        for dim, start in enumerate(piece.global_start):
            shape = [1] * places.dim()
            shape[dim] = -1
            places += ((torch.arange(piece.tensor.shape[dim]) + start) % 16).view(shape) * 16**dim
        piece.tensor.copy_(places)
        elements += places.numel()
    engine.refresh()
    (total,) = mesh.sum_numbers([elements])
    expected = sum(parameter.mesh_layout.num_global for parameter in model.parameters())
    assert total == expected, f"{total:,.0f} elements of masters for {expected:,} of the model"
    right = {}
    for (name, weight), (_, parameter) in zip(engine.named_weights(), model.named_parameters(), strict=True):
        layout = parameter.mesh_layout
        grid = torch.zeros(layout.global_shape)
        for dim, length in enumerate(layout.global_shape):
            shape = [1] * grid.dim()
            shape[dim] = -1
            grid += (torch.arange(length) % 16).view(shape) * 16**dim
        held = layout.parts(weight.view(layout.local_shape))
        right[name] = all(torch.equal(a, b) for a, b in zip(held, layout.parts(layout.cut(grid)), strict=True))
    tokens = torch.arange(8).view(1, 8)
    loss = engine.forward(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    right["forward is finite"] = bool(torch.isfinite(loss))
    return right


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_masters_are_where_the_engine_looks_and_weights_follow(zero, dtype):
    for right in run_on_ranks(_write_masters, 2, Case(1, 2, zero, dtype=dtype, llama=True)):
        assert all(right.values()), right
