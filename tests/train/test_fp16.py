"""fp16 with a dynamic loss scale, on a CPU that pretends to be fit for it: arithmetic is slow there, but right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import Case, config_of, pretend_fp16, run_cases
from train.serial import assert_equals_serial, run_serially

from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.train.compare import ZERO, assemble, differences

STEPS, FIRST_SCALE, SAFE_SCALE = 8, Case().loss_scale, 2.0**12


def _config(folder: Path, case: Case, **fields) -> RunConfig:
    config = config_of(
        case,
        training={"eval_interval": 0, "train_iters": STEPS},
        optimizer={"lr": 1e-3},
        checkpoint={"save": str(folder)},
        logging={"tensorboard_dir": "none"},
    )
    for name, value in fields.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(*configs: RunConfig) -> None:
    from megatron_lite.parallel.launch import StopRequest
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.start import train_on

    pretend_fp16()
    for config in configs:
        size = torch.distributed.get_world_size()
        parallel = config.parallel
        shape = MeshShape.of_world(
            size, tensor=parallel.tensor_model_parallel_size, pipe=parallel.pipeline_model_parallel_size
        )
        mesh = ProcessMesh.create(shape)
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
        Case(pipe=2, zero=1, dtype="fp16", micro_batches=2),
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


HALF = {"dtype": "fp16", "adam_eps": 1e-4}
STAGES = [
    Case(pipe=2, layers=4, micro_batches=2, zero=1, **HALF),
    Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=1, llama=True, **HALF),
    Case(pipe=2, layers=4, virtual=2, micro_batches=2, zero=1, recompute="full", **HALF),
]
PARTS = {
    2: [
        Case(context=2, zero=1, llama=True, **HALF),
        Case(context=2, zero=3, exchange="a2a", **HALF),
        Case(pipe=2, layers=4, schedule="DualPipeV", micro_batches=4, zero=2, llama=True, **HALF),
        Case(pipe=2, layers=4, micro_batches=2, zero=3, **HALF),
    ],
    4: [
        Case(pipe=2, context=2, layers=4, schedule="InterleavedZeroBubble", micro_batches=4, zero=1, **HALF),
        Case(pipe=2, tensor=2, layers=4, micro_batches=2, zero=2, sequence_parallel=True, **HALF),
    ],
}


def test_stages_skip_the_steps_that_one_process_skips():
    serial = run_serially(STAGES)
    for reference in serial.values():
        assert {math.isfinite(norm) for _, norm in reference.curve} == {True, False}
    assert_equals_serial(2, STAGES, serial)


@pytest.mark.parametrize("ranks", sorted(PARTS))
def test_parts_of_sequences_and_layers_equal_serial_and_skip_together(ranks):
    safe = [dataclasses.replace(case, loss_scale=SAFE_SCALE) for case in PARTS[ranks]]
    assert_equals_serial(ranks, safe, run_serially(safe))
    # What overflows is a sum over a rank's own tokens, or in DeepSpeed's bucket: it need not be what one process skips.
    for case, *traces in zip(PARTS[ranks], *run_on_ranks(run_cases, ranks, PARTS[ranks]), strict=True):
        assert all(found.curve == traces[0].curve for found in traces), case
        assert {math.isfinite(norm) for _, norm in traces[0].curve} == {True, False}, case


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_after_which_the_loss_scale_grows_is_as_long_as_others(zero):
    """It grows after the third of five steps; one that was half as long would be seen under SGD."""
    case = Case(zero=zero, dtype="fp16", loss_scale=SAFE_SCALE, optimizer="sgd")
    ((ours, fp32),) = run_on_ranks(run_cases, 1, [case, Case(optimizer="sgd")])
    assert all(math.isfinite(norm) for _, norm in ours.curve)
    for (_, norm), (_, expected) in zip(ours.curve, fp32.curve, strict=True):
        assert norm == pytest.approx(expected, rel=5e-3)
    for difference in differences(assemble(ours.pieces), assemble(fp32.pieces), ZERO["fp16"]):
        assert difference.relative < 2e-2, difference
