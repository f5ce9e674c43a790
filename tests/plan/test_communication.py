"""The bytes that ranks send, by closed form, are those that they are counted to send."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import BATCH, LENGTH, VOCABULARY, Case, config_of

from megatron_lite.config.run import RunConfig
from megatron_lite.monitor.traffic import Traffic
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.communication import by_axes, sent_in_a_step
from megatron_lite.plan.report import dry_run_report
from megatron_lite.train import build
from megatron_lite.train.step import train_step

TWO = [
    Case(tensor=2),
    Case(tensor=2, sequence_parallel=True, recompute="full", dropout=0.1),
    Case(tensor=2, llama=True, recompute="full", micro_batches=2),
    Case(data=2, micro_batches=2),
    Case(data=2, zero=1, dtype="bf16"),
    Case(data=2, zero=1, optimizer="adamw8bit"),
    Case(data=2, zero=2, micro_batches=2, dtype="bf16"),
    Case(data=2, zero=2, optimizer="adamw8bit"),
    Case(data=2, zero=3, micro_batches=2),
    Case(context=2, llama=True, recompute="full"),
    Case(context=2, exchange="a2a", recompute="full"),
    Case(pipe=2, micro_batches=2),
    Case(pipe=2, micro_batches=4, schedule="ZBVZeroBubble", layers=4, zero=2),
]
FOUR = [
    Case(tensor=4, llama=True, sequence_parallel=True),
    Case(tensor=2, data=2, zero=2),
    Case(tensor=2, data=2, zero=3, dtype="bf16"),
    Case(data=2, context=2, zero=1, llama=True),
    Case(context=4, exchange="a2a", llama=True, zero=1),
    Case(pipe=2, tensor=2, micro_batches=4, virtual=2, layers=4, sequence_parallel=True, zero=1),
    Case(pipe=2, data=2, micro_batches=2, layers=3, zero=2),
]
# Matrices above and below the size up to which ZeRO 3 keeps parameters.
WIDE = {"hidden_size": 320, "qk_layernorm": True}


def _config(case: Case, model: dict[str, Any]) -> RunConfig:
    return config_of(case, model=model)


def _count(cases: list[Case], model: dict[str, Any]) -> list[dict[str, Fraction]]:
    """What this rank sends in the third step of each case: DeepSpeed looks around in the first two."""
    found = []
    for case in cases:
        mesh = ProcessMesh.create(MeshShape(case.pipe, case.data, case.context, tensor=case.tensor))
        config = _config(case, model)
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
        pipeline = build.build_pipeline(config, engine.module, mesh)
        loader = build.open_loader(config, build.open_stream(config, "train", VOCABULARY), mesh, VOCABULARY)
        for step in range(3):
            batches = loader.step(step * BATCH, BATCH)
            with Traffic() as traffic:
                train_step(
                    engine,
                    mesh,
                    batches,
                    target_tokens=BATCH * LENGTH,
                    step=step + 1,
                    seed=17 if case.dropout else None,
                    learning_rate=1e-2,
                    pipeline=pipeline,
                )
        found.append(traffic.by_axes())
    return found


def _planned(case: Case, model: dict[str, Any], rank: int) -> dict[str, Fraction]:
    place = rank // (case.data * case.context * case.tensor)
    config = _config(case, model)
    return by_axes(sent_in_a_step(config, data_size=case.data, vocab_size=VOCABULARY, pipe_rank=place))


@pytest.mark.parametrize(
    ("ranks", "cases", "model"),
    [
        (2, TWO, {}),
        (4, FOUR, {}),
        (2, [Case(tensor=2), Case(data=2, zero=3, micro_batches=2), Case(data=2, zero=3, recompute="full")], WIDE),
    ],
)
def test_what_is_planned_is_what_is_sent(ranks, cases, model):
    for rank, counted in enumerate(run_on_ranks(_count, ranks, cases, model, timeout=240)):
        for case, sent in zip(cases, counted, strict=True):
            assert sent == _planned(case, model, rank), f"rank {rank} of {case}"


def test_zero_3_in_a_pipeline_sends_at_most_what_is_planned():
    case = Case(pipe=2, data=2, zero=3, micro_batches=2)
    for rank, (sent,) in enumerate(run_on_ranks(_count, 4, [case], WIDE, timeout=240)):
        planned = _planned(case, WIDE, rank)
        counted, most = sent.pop("data"), planned.pop("data")
        assert counted <= most <= 1.02 * counted
        assert sent == planned


def _all_kinds() -> list[tuple[str, float]]:
    rank, four = dist.get_rank(), torch.ones(4)
    found = []
    world = dist.group.WORLD
    calls = {
        "all_reduce": lambda: dist.all_reduce(four),
        "all_gather": lambda: dist.all_gather([torch.empty(4) for _ in range(2)], four),
        "broadcast": lambda: dist.broadcast(four, 0),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(4), four),
        "message": lambda: dist.send(four, group=world, group_dst=1) if rank == 0 else dist.recv(torch.empty(4), 0),
    }
    for name, call in calls.items():
        with Traffic() as traffic:
            call()
        found.append((name, float(sum(traffic.sent.values()))))
    return found


def test_a_call_counts_as_round_a_ring():
    first, second = run_on_ranks(_all_kinds, 2)
    assert first == [("all_reduce", 16), ("all_gather", 16), ("broadcast", 8), ("all_to_all", 8), ("message", 16)]
    assert second[:-1] == first[:-1] and second[-1] == ("message", 0)


def test_a_dry_run_tells_what_a_step_sends():
    config = config_of(Case(tensor=2, data=2, pipe=2, zero=1, micro_batches=2))
    lines = dry_run_report(config, 8, VOCABULARY, device_type="cpu")
    start = next(i for i, line in enumerate(lines) if line.startswith("communication of pipeline rank 0"))
    told = [line.split()[0] for line in lines[start + 1 : lines.index("", start)]]
    assert sorted(told) == ["data", "pipe", "pipe+tensor", "tensor"]
    assert any("gradients" in line and "weights" in line for line in lines[start:] if line.startswith("  data"))
    alone = dry_run_report(config_of(Case()), 1, VOCABULARY, device_type="cpu")
    assert not any(line.startswith("communication") for line in alone)
