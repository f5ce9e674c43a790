"""Every layout trains as one process does: losses, gradient norms, gradients, weights after some steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import Case, config_of, run_cases
from train.serial import Reference, assert_equals_serial, run_serially


def cases_of(ranks: int) -> list[Case]:
    """Tensor x data x ZeRO x sequence parallel on that many ranks, with either model shape."""
    if ranks == 8:
        return [
            Case(4, 2, 1, sequence_parallel=True),
            Case(4, 2, 2, sequence_parallel=True, micro_batches=2, llama=True),
            Case(4, 2, 3, llama=True),
        ]
    found = []
    shapes = sorted({(t, ranks // t) for t in (1, 2, 4) if ranks % t == 0})
    for (tensor, data), zero in itertools.product(shapes, (0, 1, 2, 3)):
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            found.append(
                Case(
                    tensor,
                    data,
                    zero,
                    sequence_parallel,
                    micro_batches=1 if data == 4 else 2,
                    # Not in turn: each shape meets every stage with and without sequence parallel.
                    llama=(zero + sequence_parallel) % 2 == 1,
                )
            )
    if ranks == 2:
        found += [
            Case(2, 1, 1, micro_batches=4, llama=True, recompute="full"),
            Case(2, 1, 3, micro_batches=4, recompute="full"),
            Case(2, 1, 2, micro_batches=1, recompute="selective"),
            Case(1, 2, 2, optimizer="sgd"),
            Case(1, 2, 3, micro_batches=2, loss_chunk_size=20),
            Case(2, 1, 2, sequence_parallel=True, micro_batches=2, llama=True, loss_chunk_size=20),
        ]
    return found


RANKS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def serial() -> dict[Case, Reference]:
    return run_serially(case for ranks in RANKS for case in cases_of(ranks))


@pytest.mark.parametrize("ranks", RANKS)
def test_every_layout_equals_serial(ranks, serial):
    assert_equals_serial(ranks, cases_of(ranks), serial)


def test_bf16_follows_fp32(serial):
    """16-bit weights round, so this holds the curve, not the digits; ranks and stages must agree closer."""
    cases = [Case(2, 1, 1, dtype="bf16"), Case(1, 2, 2, dtype="bf16", micro_batches=2), Case(1, 2, 3, dtype="bf16")]
    outcomes, _ = run_on_ranks(run_cases, 2, cases, timeout=200)
    reference = serial[Case()].curve
    for case, outcome in zip(cases, outcomes, strict=True):
        for ours, theirs in zip(outcome.curve, reference, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=5e-3), case
            assert ours[1] == pytest.approx(theirs[1], rel=5e-2), case


def _accumulate_ones(zero: int, offload: str) -> float:
    """512 gradients of 1 on one bf16 weight, as the engine adds them up."""
    from megatron_lite.config.optimizer import OptimizerConfig
    from megatron_lite.optim.build import build_optimizer
    from megatron_lite.parallel.layout import replicated
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train import deepspeed_config
    from megatron_lite.train.engine import ZeroEngine

    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.mesh_layout = replicated((1, 1), 0)
    options = OptimizerConfig(clip_grad=0.0)
    optimizer = build_optimizer(options, [{"params": [module.weight]}])
    user = {"zero_optimization": {"offload_optimizer": {"device": offload}}}
    settings = deepspeed_config.merge(config_of(Case(zero=zero, dtype="bf16")), 1, user)
    engine = ZeroEngine(module, ProcessMesh.create(MeshShape()), optimizer, ("exp_avg", "exp_avg_sq"), settings)
    with engine.gradients(512) as backward:
        for _ in range(512):
            backward(engine.forward(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    return engine.step(0.0).grad_norm


@pytest.mark.parametrize(("zero", "offload"), [(1, "none"), (2, "none"), (3, "none"), (1, "cpu")])
def test_bf16_gradients_accumulate_in_fp32(zero, offload):
    # In bf16 the sum would stop at 256, where 1 is half a unit in the last place.
    assert run_on_ranks(_accumulate_ones, 1, zero, offload) == [512.0]
