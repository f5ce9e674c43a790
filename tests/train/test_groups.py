"""The process groups of a run: no more than there are axes, each with the timeout asked for."""

from __future__ import annotations

from datetime import timedelta

import torch
from ranks import run_on_ranks
from torch.distributed import distributed_c10d
from train.layouts import VOCABULARY, Case, config_of

from megatron_lite.parallel import launch
from megatron_lite.train import build

MINUTES = 0.75


def _timeouts(cases: list[Case]) -> list[float]:
    """Seconds each group of these runs gives its collectives, but for the first, which the harness made."""
    launch.start = lambda *arguments: torch.device("cpu")
    for case in cases:
        me = launch.Launch(world_size=case.tensor * case.data)
        mesh = build.start_ranks(me, tensor=case.tensor, timeout_minutes=MINUTES)
        assert list(mesh._groups) == [("tensor",) if case.tensor > 1 else ("data",)], "no group of an axis of size 1"
        config = config_of(case)
        build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
        mesh.subgroup("tensor", 2)
    groups = [group for group in distributed_c10d._world.pg_map if group is not torch.distributed.group.WORLD]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    return [timeout / timedelta(seconds=1) for timeout in timeouts]


def test_every_group_has_the_timeout_that_was_asked_for():
    for timeouts in run_on_ranks(_timeouts, 2, [Case(2, 1, 1), Case(1, 2, 3)]):
        # For each mesh its axis, the gloo group beside it, and what DeepSpeed wants of its own.
        assert len(timeouts) >= 6 and set(timeouts) == {60 * MINUTES}
