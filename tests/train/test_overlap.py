"""Gradients summed beside backward are those summed after it, to the last bit."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of, curve_of

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import NonFiniteError
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.gradient_buckets import GradientBuckets, in_backward_order
from megatron_lite.train.step import train_step


def _parameters(*lengths: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(length)) for length in lengths]


def test_buckets_come_from_the_end_and_are_full():
    parameters = _parameters(4, 1, 2, 3, 5)
    lengths = [[p.numel() for p in bucket] for bucket in in_backward_order(parameters, 5)]
    assert lengths == [[5], [3, 2], [1, 4]]


def test_buckets_start_in_order_and_as_soon_as_they_can():
    a, b, c, d = _parameters(1, 1, 1, 1)
    started: list[int] = []
    waited: list[int] = []

    def start(number):
        started.append(number)
        return [types.SimpleNamespace(wait=lambda: waited.append(number))]

    buckets = GradientBuckets([[d, c], [b], [a]], start, under_way=1)
    for parameter in (a, b, c, d):
        buckets.arrived(parameter)
    assert not started, "gradients of an earlier micro-batch"
    buckets.expect()
    buckets.arrived(b)
    buckets.arrived(d)
    assert not started, "the first bucket is not full"
    buckets.arrived(c)
    assert started == [0, 1] and waited == [0]
    buckets.finish()
    assert started == waited == [0, 1, 2]
    started.clear()
    buckets.finish()
    assert started == [0, 1, 2]


CASES = [
    Case(data=2, micro_batches=2),
    Case(data=2, zero=1, micro_batches=2, llama=True),
    Case(data=2, zero=1, dtype="bf16", recompute="full"),
    Case(data=2, zero=2, micro_batches=2),
    Case(data=2, zero=3),
    Case(context=2, zero=1, llama=True),
    Case(context=2, recompute="full"),
]
FOUR = [
    Case(data=4, zero=1),
    Case(data=4),
    Case(data=2, tensor=2, zero=1, sequence_parallel=True, micro_batches=2),
    Case(data=2, context=2, zero=1, optimizer="adamw8bit"),
]


def _config(case: Case, overlap: bool) -> RunConfig:
    # Some twenty buckets, and gradients that are clipped.
    parallel = {"overlap_grad_reduce": overlap, "ddp_bucket_size": 1500}
    return sources.override(config_of(case), {"parallel": parallel, "optimizer": {"clip_grad": 0.5}})


def _train(cases: list[Case], overlap: bool) -> list[tuple[list[tuple[float, float]], list[torch.Tensor], list[int]]]:
    """Losses and norms of each case, this rank's weights after, and the buckets started within each backward."""
    found = []
    for case in cases:
        mesh = ProcessMesh.create(MeshShape(case.pipe, case.data, case.context, tensor=case.tensor))
        config = _config(case, overlap)
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
        early = _count_early(engine)
        curve = curve_of(config, engine, mesh, range(3))
        found.append((curve, [piece.tensor.clone() for piece in engine.pieces()], early))
    return found


def _count_early(engine: Any) -> list[int]:
    """The numbers of the buckets that are started before a step's backward has ended."""
    early: list[int] = []
    holder = getattr(engine, "_flat_gradients", None) or engine
    if (buckets := getattr(holder, "_buckets", None)) is not None:
        start, finish, ended = buckets._start, buckets.finish, []
        buckets._start = lambda number: (None if ended else early.append(number), start(number))[1]
        buckets.finish = lambda: (ended.append(True), finish(), ended.clear())
    return early


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (4, FOUR)])
def test_the_same_bits_with_and_without(ranks, cases):
    plain, overlapped = (run_on_ranks(_train, ranks, cases, overlap, timeout=300) for overlap in (False, True))
    for rank in range(ranks):
        for case, (curve, pieces, _), (their_curve, theirs, early) in zip(
            cases, plain[rank], overlapped[rank], strict=True
        ):
            assert curve == their_curve, case
            assert all(torch.equal(a, b) for a, b in zip(pieces, theirs, strict=True)), case
            if case.zero < 2:
                assert len(early) >= 3 * 5, f"{case} sums nothing beside backward"
    assert all(norm > 0.5 for _, norm in plain[0][0][0]), "gradients are clipped"


def _poisoned(case: Case) -> str:
    """What a rank says of a step after a weight has become NaN on rank 1."""
    mesh = ProcessMesh.create(MeshShape(data=2))
    config = _config(case, True)
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
    if mesh.rank("data") == 1:
        with torch.no_grad():
            dict(engine.module.named_parameters())["layers.1.mlp.down.weight"][0, 0] = torch.nan
    try:
        options = {"target_tokens": BATCH * LENGTH, "step": 1, "seed": None, "learning_rate": 1e-2}
        train_step(engine, mesh, loader.step(0, BATCH), **options)
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("zero", [0, 1])
def test_a_nan_is_found_and_named(zero):
    told = run_on_ranks(_poisoned, 2, dataclasses.replace(CASES[0], zero=zero))
    assert all("layers.1.mlp.down.weight" in text for text in told)
