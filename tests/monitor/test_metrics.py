import math

import pytest
import torch

from megatron_lite.monitor.metrics import METRICS, Metrics, throughput


def test_values_are_reduced_as_asked_and_read_once():
    metrics = Metrics()
    for value in (1.0, 2.0, 6.0):
        metrics.record("loss", torch.tensor(value), how="mean")
        metrics.record("lr", value)
        metrics.record("consumed_tokens", torch.tensor(2**40 + 1), how="sum")
        metrics.record("grad_norm", torch.tensor(-value), how="max")
    collected = metrics.collect()
    assert collected == {"loss": 3.0, "lr": 6.0, "consumed_tokens": 3 * (2**40 + 1), "grad_norm": -1.0}
    assert isinstance(collected["consumed_tokens"], int)
    assert list(collected) == [name for name in METRICS if name in collected]
    assert metrics.collect() == {}


def test_a_recorded_tensor_is_not_changed_by_its_owner():
    metrics, running = Metrics(), torch.zeros(1, requires_grad=True)
    metrics.record("loss", running, how="sum")
    with torch.no_grad():
        running += 5
    metrics.record("loss", running, how="sum")
    assert metrics.collect() == {"loss": 5.0}


def test_not_a_number_survives_every_reduction():
    for how in ("last", "mean", "sum", "max"):
        metrics = Metrics()
        metrics.record("loss", 1.0, how=how)
        metrics.record("loss", math.nan, how=how)
        assert math.isnan(metrics.collect()["loss"])
    metrics = Metrics()
    metrics.record("loss", math.inf, how="mean")
    metrics.record("loss", 1.0, how="mean")
    assert metrics.collect()["loss"] == math.inf


def test_names_and_reductions_are_held():
    metrics = Metrics()
    with pytest.raises(ValueError, match="unknown metric 'los'"):
        metrics.record("los", 1.0)
    metrics.record("loss", 1.0, how="mean")
    with pytest.raises(ValueError, match="recorded as 'mean'"):
        metrics.record("loss", 1.0, how="sum")


def test_throughput_by_hand():
    # 8,192 tokens in half a second on 2 ranks at 1 GFLOP a token: 16,384 GFLOP/s, half of it a rank.
    speeds = throughput(tokens=8192, seconds=0.5, world_size=2, flops_per_token=1e9, peak_flops=32.768e12)
    assert speeds == {"iteration_time": 0.5, "tokens_per_second": 16384.0, "model_tflops": 8.192, "mfu": 0.25}
    assert "mfu" not in throughput(tokens=1, seconds=1, world_size=1, flops_per_token=1, peak_flops=None)
    assert set(speeds) <= set(METRICS)
