"""A run that goes on at another layout, both drawn at random: the state loaded is the state saved, the curve goes on.

`--seed N` draws other layouts.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import Case, config_of
from train.test_random_layouts import BATCH, drawn

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.rules import problems
from megatron_lite.train.start import train_on

PAIRS = [(2, 8), (4, 2), (2, 4)]
"""Ranks before and after."""
CHANGE, STEPS = 2, 4
LARGEST_DIFFERENCE = {"fp32": 1e-5, "bf16": 1e-3}


def _config(case: Case, folder: Path, **sections) -> RunConfig:
    config = config_of(
        case,
        training={"train_iters": STEPS, "eval_interval": 0},
        # Nothing is to follow from the number of steps that a run is told to make.
        optimizer={"lr_decay_style": "constant"},
        checkpoint={"save": str(folder), "save_interval": CHANGE},
        logging={"tensorboard_dir": "none"},
    )
    return sources.override(config, sections)


def _train(configs: list[RunConfig]) -> None:
    for config in configs:
        parallel = config.parallel
        shape = MeshShape.of_world(
            dist.get_world_size(),
            tensor=parallel.tensor_model_parallel_size,
            pipe=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
        )
        train_on(ProcessMesh.create(shape), config, StopRequest(), "")


def _train_by_world(jobs: list[tuple[int, RunConfig]]) -> None:
    for world in sorted({world for world, _ in jobs}):
        run_on_ranks(_train, world, [config for ranks, config in jobs if ranks == world], timeout=1500)


def _records(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def _draw(ranks: int, source: random.Random, **same) -> Case:
    """A layout of so many ranks that is allowed, with those fields; without dropout, whose masks are not compared."""
    while True:
        case = dataclasses.replace(drawn(ranks, source), dropout=0.0, steps=STEPS, **same)
        if not problems(config_of(case), ranks):
            return case


def test_pairs_of_layouts(request, tmp_path):
    source = random.Random(request.config.getoption("--seed") or 1)
    pairs = []
    for number, (before, after) in enumerate(PAIRS):
        # 8-bit state is quantised anew where blocks differ: tests/checkpoint/test_codes.py holds that.
        first = _draw(before, source, optimizer=source.choice(["adamw", "sgd"]), dtype=("fp32", "bf16")[number % 2])
        kept = ("layers", "model", "optimizer", "dtype", "documents", "pieces")
        second = _draw(after, source, **{name: getattr(first, name) for name in kept})
        pairs.append((first, second, tmp_path / f"{number}-whole", tmp_path / f"{number}-parts"))
    _train_by_world(
        [(ranks, _config(first, whole)) for (ranks, _), (first, _, whole, _) in zip(PAIRS, pairs, strict=True)]
    )
    jobs = []
    for (_, ranks), (_, second, whole, parts) in zip(PAIRS, pairs, strict=True):
        load = {"load": str(whole), "ckpt_step": CHANGE}
        # Loaded and saved again without a step in between, then trained on from that.
        jobs.append((ranks, _config(second, parts, checkpoint=load, training={"train_iters": CHANGE})))
        jobs.append((ranks, _config(second, parts)))
    _train_by_world(jobs)
    for first, second, whole, parts in pairs:
        what = f"{first} -> {second}"
        saved, loaded = whole / store.step_name(CHANGE), parts / store.step_name(CHANGE)
        names = read_manifest(saved).tensors
        assert names.keys() == read_manifest(loaded).tensors.keys(), what
        for name in names:
            assert read_tensor(saved, name).equal(read_tensor(loaded, name)), f"{what}: {name}"
        ours, theirs = _records(parts), _records(whole)
        assert sorted(ours) == [3, 4], what
        for step in ours:
            assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=LARGEST_DIFFERENCE[first.dtype]), what
            assert ours[step]["consumed_samples"] == theirs[step]["consumed_samples"] == step * BATCH


def test_data_position_carries_over_when_batch_sizes_change(tmp_path):
    """From 4 sequences a step on one rank to 8 on two, in other micro-batches; beside a run that ramps up so."""
    half, full = BATCH // 2, BATCH
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first, second = Case(batch=half, steps=STEPS), Case(data=2, zero=2, batch=full, micro_batches=4, steps=STEPS)
    ramp = {"rampup_batch_size": (half, half, full), "global_batch_size": full, "micro_batch_size": half}
    run_on_ranks(
        _train,
        1,
        [
            _config(first, whole, training=ramp),
            _config(first, parts, training={"train_iters": STEPS, "exit_interval": CHANGE}),
        ],
    )
    run_on_ranks(_train, 2, [_config(second, parts)])
    ours, theirs = _records(parts), _records(whole)
    assert [ours[step]["consumed_samples"] for step in sorted(ours)] == [
        half,
        2 * half,
        2 * half + full,
        2 * half + 2 * full,
    ]
    for step in theirs:
        assert ours[step]["consumed_samples"] == theirs[step]["consumed_samples"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5), step
