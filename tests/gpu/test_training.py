"""Whole runs of pretrain_gpt.py on one GPU: precisions, ZeRO stages, resume, dropout, memory, MFU."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.plan.devices import dense_peak_flops

ROOT = Path(__file__).parents[2]
STEPS = 6
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "seq_length": 32,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "lr": 1e-3,
    # A tiny epsilon would turn the rounding noise of zero gradients into steps.
    "adam_eps": 1e-5,
    "train_iters": STEPS,
    "eval_interval": 0,
}
DETERMINISTIC = """
import runpy, sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder: Path, device: str, *, exactly: bool = False, **options) -> str:
    """What a run in `folder` says; it must end well. `exactly`: without kernels that add in no fixed order."""
    arguments = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**MODEL, **options}.items() if value is not True
    ]
    arguments += [f"--{name.replace('_', '-')}" for name, value in options.items() if value is True]
    python = [sys.executable, "-c", DETERMINISTIC] if exactly else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*python, "pretrain_gpt.py", "--mock-data", f"--run-dir={folder}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def records(folder: Path) -> list[dict]:
    """The lines of metrics of a run, one a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, device: str, **options) -> list[float]:
    start(folder, device, **options)
    return [record["loss"] for record in records(folder)]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory, device) -> list[dict]:
    """The fp32 run on the CPU, without DeepSpeed: what all others are held to."""
    folder = tmp_path_factory.mktemp("cpu")
    start(folder, "cpu", zero_stage=0)
    return records(folder)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_the_cpu_at_every_stage(stage, on_the_cpu, device, tmp_path):
    start(tmp_path, device, zero_stage=stage)
    for ours, theirs in zip(records(tmp_path), on_the_cpu, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(stage, on_the_cpu, device, tmp_path):
    start(tmp_path, device, zero_stage=stage, bf16=True)
    for ours, theirs in zip(records(tmp_path), on_the_cpu, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2), ours["step"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_finds_its_loss_scale(stage, on_the_cpu, device, tmp_path):
    if device == "cpu":
        pytest.skip("DeepSpeed refuses fp16 on a CPU")
    start(tmp_path, device, zero_stage=stage, fp16=True, initial_loss_scale=2**32, hysteresis=1, train_iters=30)
    found = records(tmp_path)
    scales = [record["loss_scale"] for record in found]
    skipped = found[-1]["skipped_steps"]
    assert scales[0] == 2**32 and 1 <= skipped < 30
    assert all(after in (before, before / 2) for before, after in itertools.pairwise(scales))
    # A skipped step changes no weight, so the loss of the first one that counts is that of the untrained model.
    assert math.isfinite(found[-1]["loss"]) and found[-1]["loss"] < found[skipped]["loss"]
    assert found[0]["loss"] == pytest.approx(on_the_cpu[0]["loss"], rel=2e-3)


def test_dropout_follows_from_the_seed(device, tmp_path):
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 3, "exactly": True}
    first = losses(tmp_path / "first", device, **dropout)
    assert losses(tmp_path / "again", device, **dropout) == first
    assert losses(tmp_path / "recomputed", device, **dropout, recompute_granularity="full") == pytest.approx(
        first, rel=1e-5
    )
    # Another seed is other data and weights too; without dropout only the masks are missing.
    whole = losses(tmp_path / "whole", device, train_iters=3)
    assert all(abs(a - b) > 1e-4 * b for a, b in zip(first, whole, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 0},
        {"zero_stage": 1, "bf16": True},
        {"zero_stage": 2, "bf16": True},
        {"zero_stage": 3, "bf16": True},
        {"zero_stage": 1, "fp16": True, "initial_loss_scale": 2**20, "loss_scale_window": 2, "hysteresis": 1},
        {"zero_stage": 3, "fp16": True, "initial_loss_scale": 2**20, "loss_scale_window": 2, "hysteresis": 1},
        {"optimizer": "adamw8bit", "zero_stage": 0},
        {"optimizer": "adamw8bit", "zero_stage": 3, "bf16": True},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in list(options.items())[:2]),
)
def test_resume_is_bitwise(options, device, tmp_path):
    if device == "cpu" and "fp16" in options:
        pytest.skip("DeepSpeed refuses fp16 on a CPU")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {**options, "hidden_dropout": 0.1, "attention_dropout": 0.1, "exactly": True}
    start(whole, device, **options, save=whole)
    start(parts, device, **options, save=parts, exit_interval=3)
    start(parts, device, **options, save=parts)
    for name in ("loss", "grad_norm", "loss_scale", "skipped_steps"):
        assert [record[name] for record in records(parts)] == [record[name] for record in records(whole)], name
    last = f"step-{STEPS:08d}"
    names = read_manifest(whole / last).tensors
    assert names
    for name in names:
        assert torch.equal(read_tensor(whole / last, name), read_tensor(parts / last, name)), name


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_is_as_planned(stage, recompute, device, tmp_path):
    if device == "cpu":
        pytest.skip("a CPU has no allocator to ask")
    said = start(
        tmp_path,
        device,
        zero_stage=stage,
        bf16=True,
        recompute_granularity=recompute,
        train_iters=3,
        num_layers=8,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=32000,
        seq_length=1024,
        micro_batch_size=8,
        global_batch_size=16,
    )
    share = re.search(r"peak memory of a rank: predicted .* measured .*, (\d+)%", said)
    assert share is not None, said
    assert 90 <= int(share[1]) <= 110, share[0]


def test_mfu_is_given_where_the_peak_is_known(device, tmp_path):
    if device == "cpu":
        pytest.skip("no dense peak of a CPU is known")
    name = torch.cuda.get_device_name()
    said = start(tmp_path, device, bf16=True)
    if dense_peak_flops(name, "bf16") is None:
        assert "MFU: unknown device" in said
    else:
        assert 0.0 < records(tmp_path)[-1]["mfu"] < 1.0
