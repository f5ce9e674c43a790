"""Mesh arithmetic against a brute-force oracle; live groups and JSON between ranks."""

import itertools
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.layout_line import parse_layout
from megatron_lite.parallel.mesh_shape import AXES, MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 2, 1, 1, 2), (1, 3, 2, 1, 2), (2, 1, 2, 2, 2), (3, 2, 2, 2, 4)])
def test_groups_are_slices_of_the_rank_grid(sizes):
    shape = MeshShape(*sizes)
    grid = np.arange(shape.world_size).reshape(sizes)
    for count in range(1, len(AXES) + 1):
        for axes in itertools.combinations(AXES, count):
            dims = [AXES.index(axis) for axis in axes]
            moved = np.moveaxis(grid, dims, range(-count, 0)).reshape(-1, shape.size(*axes))
            assert list(shape.groups(*axes)) == sorted(moved.tolist())
            for rank in range(shape.world_size):
                assert shape.group_of(rank, *axes) == next(row for row in moved.tolist() if rank in row)
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        assert tuple(shape.coordinates(rank).values()) == place
        assert shape.rank(**shape.coordinates(rank)) == rank


def test_16384_ranks():
    shape = MeshShape(pipe=16, data=32, context=4, tensor=8)
    everybody = list(range(16384))
    for axes in ((axis,) for axis in AXES):
        groups = list(shape.groups(*axes))
        assert sorted(itertools.chain.from_iterable(groups)) == everybody
        for group in groups[:: max(1, len(groups) // 50)]:
            assert all(shape.group_of(rank, *axes) == group for rank in group)
    with pytest.raises(ValueError, match="rank 16384 is outside a world of 16384"):
        shape.coordinates(16384)


def test_world_that_does_not_divide_is_refused_with_the_numbers():
    assert MeshShape.of_world(8, tensor=4).data == 2
    with pytest.raises(ConfigError, match=r"world size 6 .* = 4; start 4 or 8 ranks"):
        MeshShape.of_world(6, tensor=4)


def test_layout_line():
    layout = parse_layout("tp=2, dp=4,zero=3")
    assert layout.shape == MeshShape(data=4, tensor=2) and layout.zero == 3 and layout.schedule is None
    assert parse_layout("pp=2,vpp=2,schedule=LoopedBFS").schedule == "LoopedBFS"
    whole = parse_layout("tp=2,pp=2,vpp=2,cp=2,dp=2,zero=2,schedule=LoopedBFS,sp=1,cp-comm=a2a")
    parallel = whole.put_on(RunConfig()).parallel
    assert whole.shape.world_size == 16 and parallel.model_parallel_size == 8
    assert parallel == ParallelConfig(2, True, 2, "LoopedBFS", 2, None, None, 2, "a2a", 2)
    # What is left out is 1, or as configured.
    configured = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True))
    parallel = parse_layout("dp=2").put_on(configured).parallel
    assert parallel.tensor_model_parallel_size == 1 and parallel.sequence_parallel
    for bad in ("tp=0", "tq=2", "tp", "zero=4", "tp=2,tp=4", "sp=2", "cp-comm=ring", "ep=2", "schedule="):
        with pytest.raises(ConfigError, match=r"--layout (has|.* twice)"):
            parse_layout(bad)


def _talk():
    mesh = ProcessMesh.create(MeshShape(data=2, tensor=2))
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total, group=mesh.group("tensor"))
    pair = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(pair, group=mesh.subgroup("tensor", 2))
    return total.item(), pair.item(), mesh.gather_json({"rank": mesh.global_rank, "text": "é" * mesh.global_rank})


def test_groups_of_gpus_outlast_the_time_after_which_the_watch_speaks(monkeypatch):
    made = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_group", lambda ranks=None, timeout=None, **words: made.append((timeout, words)))
    longest, grace = timedelta(minutes=7), timedelta(minutes=2)
    for device, waits in (("cuda", longest + grace), ("cpu", longest)):
        made.clear()
        ProcessMesh.create(MeshShape(data=2, tensor=2), device, longest)
        *groups, (timeout, words) = made
        assert len(groups) == 4 and all(of_groups == waits for of_groups, _ in groups)
        assert words["backend"] == "gloo" and timeout == longest, "gloo's errors are raised, and need no grace"


def test_live_groups():
    results = run_on_ranks(_talk, 4)
    assert [total for total, _, _ in results] == [1.0, 1.0, 5.0, 5.0]
    assert [pair for _, pair, _ in results] == [1.0, 1.0, 5.0, 5.0]
    assert all(said == [{"rank": r, "text": "é" * r} for r in range(4)] for _, _, said in results)


def _fail_on_one():
    if dist.get_rank() == 1:
        raise RuntimeError("planted")
    dist.barrier()


def test_harness_gives_the_failing_rank():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(?s:.*)planted"):
        run_on_ranks(_fail_on_one, 2, timeout=30)


def test_one_process_needs_no_group():
    mesh = ProcessMesh.create(MeshShape())
    assert mesh.group("tensor") is None and mesh.gather_json([1]) == [[1]]
