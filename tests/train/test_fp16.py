"""fp16 with a dynamic loss scale, on a CPU that pretends to be fit for it: arithmetic is slow there, but right."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import Case, config_of

from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig

STEPS, FIRST_SCALE = 8, 2.0**20


def _config(folder: Path, case: Case, **fields) -> RunConfig:
    config = config_of(
        case,
        precision={
            "fp16": case.dtype == "fp16",
            "initial_loss_scale": FIRST_SCALE,
            "hysteresis": 1,
            "loss_scale_window": 3,
        },
        training={"eval_interval": 0, "train_iters": STEPS},
        optimizer={"lr": 1e-3},
        checkpoint={"save": str(folder)},
        logging={"tensorboard_dir": "none"},
    )
    for name, value in fields.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(*configs: RunConfig) -> None:
    from deepspeed.accelerator import get_accelerator

    from megatron_lite.config import check
    from megatron_lite.parallel.launch import StopRequest
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.start import train_on

    get_accelerator().is_fp16_supported = lambda: True
    check.precision_problems = lambda *_, **__: []
    for config in configs:
        size = torch.distributed.get_world_size()
        mesh = ProcessMesh.create(MeshShape.of_world(size, tensor=config.parallel.tensor_model_parallel_size))
        train_on(mesh, config, StopRequest(), "test")


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 1, dtype="fp16"),
        Case(1, 2, 2, dtype="fp16"),
        Case(1, 2, 3, dtype="fp16"),
        Case(2, 1, 1, dtype="fp16"),
    ],
    ids=str,
)
def test_overflows_are_skipped_and_the_rest_is_fp32s_curve(case, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    still = _config(tmp_path / "fp32", dataclasses.replace(case, dtype="fp32"), lr=1e-30, weight_decay=0.0)
    run_on_ranks(_train, 2, still, _config(whole, case), _config(parts, case, exit_interval=3), _config(parts, case))
    records = _records(whole)
    scales, skipped = [r["loss_scale"] for r in records], [r["skipped_steps"] for r in records]
    assert scales[0] == FIRST_SCALE and skipped[0] == 1, "the first gradient must overflow"
    assert all(b in (a / 2, a, a * 2) for a, b in itertools.pairwise(scales))
    assert 1 <= skipped[-1] <= 4
    # Skipped steps change no weight, so until the first good one losses and norms are the fp32 model's.
    good = next(i for i, record in enumerate(records) if record["grad_norm"] is not None)
    fresh = _records(tmp_path / "fp32")
    for ours, theirs in zip(records[: good + 1], fresh, strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert records[good]["grad_norm"] == pytest.approx(fresh[good]["grad_norm"], rel=2e-2)
    again = _records(parts)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert [r["loss_scale"] for r in again] == scales
    last = f"step-{STEPS:08d}"
    for name in read_manifest(whole / last).tensors:
        assert torch.equal(read_tensor(whole / last, name), read_tensor(parts / last, name)), name
