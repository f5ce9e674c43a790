"""What train/engine.py takes for granted inside DeepSpeed, beyond its documented interface."""

from __future__ import annotations

import sys

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of

from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build

RATE = 0.5


def _engine(case: Case):
    mesh = ProcessMesh.create(MeshShape(data=case.data, tensor=case.tensor))
    config = config_of(case, optimizer={"clip_grad": 0.0, "sgd_momentum": 0.0, "weight_decay": 0.0})
    return build.build_engine(config, build.build_model(config, mesh, VOCABULARY), mesh)


def _backward(engine, tokens) -> None:
    with engine.gradients(1) as backward:
        backward(engine.forward(tokens, tokens, torch.ones(tokens.shape)) / (BATCH * LENGTH))


def _stage_1(dtype: str) -> None:
    engine = _engine(Case(data=2, zero=1, dtype=dtype, optimizer="sgd"))
    zero = engine._zero
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % VOCABULARY
    rank = engine.mesh.rank("data")
    for flat, group in zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True):
        for parameter in group:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            assert torch.equal(flat[start : start + parameter.numel()], parameter.detach().view(-1))

    _backward(engine, tokens)
    parts = [zero.averaged_gradients[group] for group in range(len(zero.bit16_groups))]
    for part, group in zip(parts, zero.bit16_groups, strict=True):
        links = [parameter._hp_mapping for parameter in group if parameter._hp_mapping is not None]
        assert [view.numel() for view in part] == [link.hp_fragment_address.numel for link in links]
        assert [view.storage_offset() - part.flat_partition.storage_offset() for view in part] == [
            link.hp_fragment_address.start for link in links
        ]
    masters = engine._masters()
    shares = [flat.chunk(2)[rank] for flat in zero.bit16_groups_flat]
    for master, share in zip(masters, shares, strict=True):
        # In fp32 the weights are their own masters.
        assert (master.data_ptr() == share.data_ptr()) == (dtype == "fp32")
    # Plain SGD: the step takes the flat parts as they are, averages nothing and copies no weight wrongly.
    expected = [master.detach() - RATE * part.flat_partition for master, part in zip(masters, parts, strict=True)]
    outcome = engine.step(RATE)
    assert outcome.grad_norm > 0.0 and not outcome.skipped
    for master, share, wanted in zip(masters, shares, expected, strict=True):
        assert torch.equal(master.detach(), wanted)
        assert torch.equal(share, wanted.to(share.dtype))
    for _, parameter in engine.module.named_parameters():
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_1_takes_gradients_that_are_flat_and_reduced(dtype):
    run_on_ranks(_stage_1, 2, dtype)


def _not_finite() -> None:
    engine = _engine(Case(zero=1))
    before = [master.detach().clone() for master in engine._masters()]
    _backward(engine, torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    engine._zero.averaged_gradients[0].flat_partition[3] = float("nan")
    assert engine.step(RATE).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, engine._masters(), strict=True))


def test_a_step_with_a_gradient_that_is_not_finite_changes_no_weight():
    run_on_ranks(_not_finite, 1)


_SLOW = {"torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.pipelining", "sympy"}
"""What takes as long to import as all else that a rank needs."""


def _slow_imports(stage: int) -> set[str]:
    engine = _engine(Case(zero=stage))
    _backward(engine, torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    engine.step(RATE)
    return _SLOW.intersection(sys.modules)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_neither_a_compiler_nor_what_pipelines_need_is_loaded_by_the_first_step(stage):
    assert run_on_ranks(_slow_imports, 1, stage) == [set()]


def test_stage_3_loads_no_more_of_the_compiler_than_deepspeed_asks_for():
    (loaded,) = run_on_ranks(_slow_imports, 1, 3)
    assert not loaded & {"torch._inductor.compile_fx", "torch.distributed.pipelining"}
