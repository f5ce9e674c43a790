"""Weights & Biases itself, offline, where it is installed."""

from __future__ import annotations

import json

import pytest

from megatron_lite.config.logging import LoggingConfig
from megatron_lite.monitor.sinks import WandbSink

wandb = pytest.importorskip("wandb")


def test_an_offline_run_and_its_resume_are_one_run_with_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LoggingConfig(wandb_project="our_project", wandb_exp_name="our_name")
    for steps, resume_step in (((1, 2, 3), 0), ((4, 5), 3)):
        sink = WandbSink(config, tmp_path, resume_step, {"model": {"num_layers": 17}})
        for step in steps:
            sink.write({"step": step, "loss_of_this_test": 10.0 + step})
        sink.close()
    wandb.teardown()  # its service writes when it ends
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert state["step"] == 5
    journals = [path.read_bytes() for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{state['id']}.wandb"))]
    for journal, values in zip(journals, ((b"11", b"12", b"13"), (b"14", b"15")), strict=True):
        assert b"our_project" in journal and b"our_name" in journal and b'"num_layers":17' in journal
        assert journal.count(b"loss_of_this_test") >= len(values)
        assert all(value in journal for value in values)
