"""Stages, placements and rules of a pipeline, and what the last stage holds of a step."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import nn

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline.partition import (
    balanced_counts,
    folded,
    looped,
    parse_pipeline_layout,
    stages_of_counts,
)
from megatron_lite.parallel.pipeline.rules import pipeline_plan, problems
from megatron_lite.parallel.pipeline.runner import Pipeline
from megatron_lite.parallel.process_mesh import ProcessMesh


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 4), st.floats(0, 6))
def test_no_partition_has_a_cheaper_worst_stage(layers, stages, embedding, head):
    if stages > layers:
        with pytest.raises(ConfigError, match=f"{stages} pipeline stages"):
            balanced_counts(layers, stages, embedding=embedding, head=head)
        return

    def worst(counts):
        ends = [0.0] * stages
        ends[0] += embedding
        ends[-1] += head
        return max(count + end for count, end in zip(counts, ends, strict=True))

    counts = balanced_counts(layers, stages, embedding=embedding, head=head)
    assert sum(counts) == layers and min(counts) >= 1
    cuts = itertools.combinations(range(1, layers), stages - 1)
    every = ([b - a for a, b in itertools.pairwise((0, *cut, layers))] for cut in cuts)
    assert worst(counts) == min(worst(counts) for counts in every)


def test_layers_are_numbered_through():
    assert [list(stage.layers) for stage in stages_of_counts([2, 0, 1])] == [[0, 1], [], [2]]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("EtL", [1]),
        ("Et*3|(tt|)*2,t*2L", [3, 2, 2, 2]),
        ("E|t|t|L", [0, 1, 1, 0]),
        ("Et*2 | (t|)*2 tL", [2, 1, 1, 1]),
    ],
)
def test_megatrons_notation(text, counts):
    assert parse_pipeline_layout(text, sum(counts)) == counts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Et|tL", "has 2 layers"),
        ("tt|tL", "does not begin with E"),
        ("Ett|t", "does not begin with E"),
        ("Et|Lt|t", "does not begin with E"),
        ("Ettx|tL", "has 'x'"),
        ("E(tt|tL", r"has '\('"),
    ],
)
def test_what_is_no_layout_is_said(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_pipeline_layout(text, 3)


def test_placements():
    assert looped(2, 4) == (0, 1, 0, 1)
    assert folded(3, 6) == (0, 1, 2, 2, 1, 0)


def config_of(batch: int = 8, zero: int = 1, layers: int = 8, **parallel) -> RunConfig:
    return sources.override(
        RunConfig(),
        {
            "model": {"num_layers": layers, "vocab_size": 100},
            "training": {"micro_batch_size": 1, "global_batch_size": batch, "train_iters": 1},
            "parallel": {"pipeline_model_parallel_size": 4, "zero_stage": zero, **parallel},
        },
    )


@pytest.mark.parametrize(
    ("parallel", "name", "stages"),
    [
        ({}, "1F1B", 4),
        ({"num_virtual_stages_per_pipeline_rank": 2}, "Interleaved1F1B", 8),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "Interleaved1F1B", 8),
        ({"pipeline_model_parallel_layout": "Et|t|t|t|t|t|t|tL"}, "Interleaved1F1B", 8),
        ({"pipeline_schedule": "zbvzerobubble"}, "ZBVZeroBubble", 8),
        ({"pipeline_schedule": "GPipe"}, "GPipe", 4),
    ],
)
def test_the_schedule_follows_the_flags(parallel, name, stages):
    config = config_of(**parallel)
    assert problems(config, 4) == []
    plan = pipeline_plan(config)
    assert (plan.schedule.name, plan.stages) == (name, stages)
    assert plan.ends == ((0, 0) if name.startswith("ZBV") else (0, 3))
    assert sorted(itertools.chain(*(plan.held_by(rank) for rank in range(4)))) == list(range(stages))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"pipeline_schedule": "banana"}, "choose GPipe, 1F1B,"),
        ({"pipeline_schedule": "1F1B", "num_virtual_stages_per_pipeline_rank": 2}, "choose Interleaved1F1B"),
        (
            {"pipeline_schedule": "DualPipeV", "num_virtual_stages_per_pipeline_rank": 4},
            "has 2 stages on a rank, but 4",
        ),
        ({"num_layers_per_virtual_pipeline_stage": 3}, "does not divide num_layers=8; choose 1 or 2"),
        (
            {"num_layers_per_virtual_pipeline_stage": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "2 by num_virtual_stages_per_pipeline_rank, 1 by num_layers_per_virtual_pipeline_stage",
        ),
        ({"num_virtual_stages_per_pipeline_rank": 3}, "12 stages, more than num_layers=8"),
        ({"pipeline_model_parallel_layout": "Et*4||t*4|L"}, "leaves pipeline rank 1 without anything"),
        ({"pipeline_model_parallel_layout": "Et*4|t*4L"}, "has 2 stages, which is no multiple of"),
        ({"pipeline_schedule": "ZBVZeroBubble", "zero": 3}, "choose --zero-stage 2, or"),
        ({"num_virtual_stages_per_pipeline_rank": 2, "batch": 9}, "a global_batch_size of 12"),
        (
            {"pipeline_schedule": "DualPipeV", "batch": 4},
            "takes at least its 8 stages; choose a global_batch_size of 8",
        ),
        ({"batch": 3}, "takes at least its 4 stages; choose a global_batch_size of 4"),
        ({"pipeline_model_parallel_size": 1, "pipeline_schedule": "GPipe"}, "needs a pipeline"),
        ({"pipeline_schedule": "absent.csv"}, "cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(config, says):
    found = problems(config_of(**config), 4)
    assert len(found) == 1 and says in found[0]


class _First(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens, **_):
        return self.table(tokens).transpose(0, 1).contiguous()


class _Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 7)

    def forward(self, hidden, **_):
        return self.head(hidden).square().sum()


def _inputs_alive(schedules: list[str]) -> list[int]:
    """How many of a step's inputs the last stage holds at most when it begins another forward pass."""
    mesh, most = ProcessMesh.create(MeshShape(pipe=2)), []
    for schedule in schedules:
        plan = pipeline_plan(config_of(pipeline_model_parallel_size=2, pipeline_schedule=schedule))
        module = _First() if mesh.global_rank == 0 else _Last()
        shapes = {"batch_shape": (2, 3), "hidden_shape": (3, 2, 4), "dtype": torch.float32}
        pipeline = Pipeline({mesh.global_rank: module}, plan, mesh, **shapes)
        seen: list[weakref.ref] = []
        alive = [0]

        def count(_, inputs, seen=seen, alive=alive):
            alive.append(sum(each() is not None for each in seen))
            seen.append(weakref.ref(inputs[0]))

        module.register_forward_pre_hook(count)
        tokens = [torch.zeros(2, 3, dtype=torch.int64)] * 8
        pipeline.run(tokens, tokens, tokens, None, told={}, share=lambda loss: loss / 8, take_gradients=None)
        assert len(seen) == 8
        most.append(max(alive))
    return most


def test_the_last_stage_holds_no_input_that_backward_is_done_with():
    _, last = run_on_ranks(_inputs_alive, 2, ["1F1B", "GPipe"])
    assert last == [0, 7]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0,0B0\n", "is for 1 ranks, not 4"),
        ("0F0,0B0\n1F0,1X0\n\n\n", "'1X0' in row 2"),
        ("0F0,0B0\n1F0,1B0\n1F0\n2F0\n", "stage 1 in rows 2 and 3"),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n4F0,4B0\n", "stages [0, 1, 2, 4]"),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n3F0\n", "['F'] of micro-batch 0 in stage 3"),
        ("0F0,0F0,0B0\n1F0,1B0\n2F0,2B0\n3F0,3B0\n", "['B', 'F', 'F'] of micro-batch 0 in stage 0"),
        ("0F0,0B0\n1B0,1F0\n2F0,2B0\n3F0,3B0\n", "no rank can go on: 0B0, 1B0, 2F0, 3F0 wait"),
        ("0F0,0B0\n1F0,1B0\n2F0,2B0\n3F0,3B0\n", "which is for 1; choose a global_batch_size of 1"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(text, says, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    found = problems(config_of(pipeline_schedule=str(tmp_path / "mine.csv")), 4)
    assert len(found) == 1 and says in found[0]
