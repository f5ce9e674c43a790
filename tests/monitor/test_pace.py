"""The slowest rank is found beside those that do the same work, and said when it stays slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.layouts import Case, config_of

from megatron_lite import log
from megatron_lite.model.gpt import GPT
from megatron_lite.monitor import pace
from megatron_lite.monitor.metrics import METRICS
from megatron_lite.monitor.pace import LEAST_STEPS, SLOW, TIMES, Pace
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.whereabouts import Whereabouts
from megatron_lite.train import start


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lines.append)
    monkeypatch.setattr(pace, "HERE", SimpleNamespace(take_computed=lambda: 1.0))
    return lines


def _report(watched: Pace, number: int = 1) -> dict[str, float]:
    told = [watched.metrics(step) for step in range((number - 1) * LEAST_STEPS + 1, number * LEAST_STEPS + 1)]
    assert not any(told[:-1]) and set(told[-1]) <= set(METRICS)
    return told[-1]


def test_each_rank_is_set_beside_its_peers(said):
    # The second stage has twice the work; rank 1 is slow in the first, though the others take longer.
    times = [1.0, 1.5, 1.0, 2.0, 2.1, 2.0]
    told = _report(Pace([0, 0, 0, 1, 1, 1], lambda mine: times, 1))
    assert told == {"slowest_rank": 1, "slowest_rank_time": 1.5, "slowest_rank_ratio": 1.5}


def test_where_each_stage_is_one_rank_all_are_compared(said):
    assert _report(Pace([0, 1, 2], lambda mine: [1.0, 2.0, 3.0], 1))["slowest_rank_ratio"] == 1.5


def test_what_is_told_is_the_mean_of_a_step(said):
    sent = []
    watched = Pace([0, 0], lambda mine: sent.append(mine) or [mine, mine], 4 * LEAST_STEPS)
    told = [watched.metrics(step) for step in range(1, 8 * LEAST_STEPS + 1)]
    assert sent == [1.0, 1.0] and sum(map(bool, told)) == 2


def test_one_rank_has_none_to_be_compared_with(said):
    assert _report(Pace([0], lambda mine: pytest.fail("asked"), 1)) == {}


def test_only_a_rank_that_stays_slow_is_said_and_once(said):
    times = [1.0, 1.0, 2.0 * SLOW]
    watched = Pace([0, 0, 0], lambda mine: times, 1)
    for number in range(1, TIMES):
        _report(watched, number)
    times[2] = 1.0
    _report(watched, TIMES)
    assert not said
    times[1] = 1.5
    for number in range(TIMES + 1, 3 * TIMES):
        _report(watched, number)
    assert len(said) == 1 and said[0].startswith("rank 1 has been slow for 30 steps: it computes 1.50 times")


def test_what_others_take_is_not_counted():
    here = Whereabouts()
    with here.computing(torch.device("cpu")):
        with here.waiting("a sum", 3):
            assert {what: order.rank for what, order in here.awaited.items()} == {("a sum",): 3}
            time.sleep(0.3)
        time.sleep(0.05)
    assert not here.awaited and here.waited >= 0.3
    computed = here.take_computed()
    assert computed >= 0.05 and here.take_computed() == 0
    with here.waiting():
        time.sleep(0.05)
    assert here.take_computed() == 0


def _slow_rank(folder: str) -> dict | None:
    """What is said in a run one of whose ranks sleeps in each forward pass."""
    case = Case(data=2, zero=1)
    forward = GPT.forward
    if dist.get_rank() == 1:
        GPT.forward = lambda self, *a, **o: time.sleep(1.0) or forward(self, *a, **o)
    config = config_of(
        case,
        training={"eval_interval": 0, "train_iters": LEAST_STEPS},
        logging={"tensorboard_dir": "none", "run_dir": folder},
    )
    start.train_on(ProcessMesh.create(MeshShape(data=2)), config, StopRequest(), "")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert all("slowest_rank" not in line for line in lines[:-1])
    return lines[-1]


def test_a_rank_that_sleeps_is_the_slowest(tmp_path):
    last, _ = run_on_ranks(_slow_rank, 2, str(tmp_path))
    # The other's time is its own: it waits half a second a step for the gradients, and it is not told so.
    assert last["slowest_rank"] == 1 and last["slowest_rank_time"] >= 0.5 and last["slowest_rank_ratio"] > 1
