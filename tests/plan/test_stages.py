"""What the ranks of a pipeline hold, by closed form, is what the model and torch's schedules make."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.parallel.pipeline.timeline import Action, bubble_share, most_in_flight, timeline
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.memory import moments, peak
from megatron_lite.plan.stages import chunks_in_flight, idle_and_busy, plan_stages, shapes_of_rank, stages_of_rank


def config_of(pipe: int, schedule: str | None = None, virtual: int | None = None, *, zero=1, **model) -> RunConfig:
    shape = {"num_layers": 9, "hidden_size": 32, "num_attention_heads": 4, "make_vocab_size_divisible_by": 8}
    return sources.override(
        RunConfig(),
        {
            "model": {**shape, **model},
            "data": {"seq_length": 16},
            "training": {"micro_batch_size": 1, "global_batch_size": 8},
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": pipe,
                "pipeline_schedule": schedule,
                "num_virtual_stages_per_pipeline_rank": virtual,
                "zero_stage": zero,
            },
        },
    )


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("untied", [False, True])
def test_the_parameters_of_a_rank_are_the_models(schedule, untied):
    config = config_of(3, schedule, untie_embeddings_and_output_weights=untied)
    owned = []
    for pipe_rank in range(3):
        mesh = ProcessMesh(MeshShape(pipe=3, tensor=2), rank=2 * pipe_rank)
        model = GPT(
            config.model,
            mesh,
            vocab_size=101,
            seq_length=16,
            stages=plan_stages(config, 101),
            placement=pipeline_plan(config).placement,
            device="meta",
        )
        planned = {shape.name: shape.local_shape for shape in shapes_of_rank(config, 101, pipe_rank)}
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == planned
        owned += [name for name, p in model.named_parameters() if p.mesh_layout.is_owner]
    whole = GPT(config.model, ProcessMesh(MeshShape(tensor=2), 0), vocab_size=101, seq_length=16, device="meta")
    assert sorted(owned) == sorted(name for name, _ in whole.named_parameters()), "each has one owner on tensor rank 0"


def test_the_output_layer_counts_as_layers_do():
    # 2 H V = 4 x 12 H^2 with V = 24 H, and no attention to speak of: as much as two layers of 24 H^2.
    config = config_of(3, num_layers=7, vocab_size=24 * 32)
    assert [len(stage.layers) for stage in plan_stages(config, 24 * 32)] == [3, 3, 1]


def _orders(name: str, pipe: int, held: int, micro_batches: int) -> list[list[Action]]:
    """The actions of torch's own schedule, those that it pairs one after the other. Raises ValueError as it does."""

    def stage(index):
        return types.SimpleNamespace(
            stage_index=index, num_stages=pipe * held, group_size=pipe, group_rank=0, submod=torch.nn.Linear(1, 1)
        )

    kind = torch_schedules.get_schedule_class(name)
    if name == "1F1B":
        # Torch runs it by a loop of its own, and tells of other forward passes than it runs.
        return [_one_forward_one_backward(rank, pipe - rank, micro_batches) for rank in range(pipe)]
    if name == "GPipe":
        order = kind(stage(0), micro_batches, loss_fn=torch.add)._get_pipeline_order()
    else:
        order = kind([stage(i) for i in range(held)], micro_batches, loss_fn=torch.add).pipeline_order
    kinds = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    return [
        [
            Action(part.stage_index, kinds[part.computation_type.name], part.microbatch_index)
            for action in filter(None, order[rank])
            for part in action.sub_actions or (action,)
            if part.computation_type.name in kinds
        ]
        for rank in range(pipe)
    ]


def _one_forward_one_backward(stage: int, ahead: int, micro_batches: int) -> list[Action]:
    order = [Action(stage, "F", n) for n in range(min(ahead, micro_batches))]
    for n in range(micro_batches):
        order.append(Action(stage, "B", n))
        if n + ahead < micro_batches:
            order.append(Action(stage, "F", n + ahead))
    return order


SCHEDULES = [
    ("GPipe", 1),
    ("1F1B", 1),
    ("Interleaved1F1B", 2),
    ("Interleaved1F1B", 3),
    ("LoopedBFS", 2),
    ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_what_is_in_flight_is_what_torchs_schedule_holds(schedule, virtual):
    for pipe, micro_batches in itertools.product((2, 4), (4, 8, 16)):
        if schedule == "DualPipeV" and micro_batches < 2 * pipe:
            continue
        config = config_of(pipe, schedule, virtual)
        planned = [chunks_in_flight(config, micro_batches, rank) for rank in range(pipe)]
        assert planned == [most_in_flight(order) for order in _orders(schedule, pipe, virtual, micro_batches)]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_the_bubble_is_that_of_torchs_schedule_in_unit_times(schedule, virtual):
    tried = 0
    for pipe, micro_batches in itertools.product((2, 3, 4, 6), range(1, 15)):
        config = config_of(pipe, schedule, virtual, num_layers=18)
        if schedule in ("1F1B", "DualPipeV") and micro_batches < pipe * virtual:
            continue
        try:
            spans = timeline(_orders(schedule, pipe, virtual, micro_batches))
        except ValueError as error:
            assert "number of microbatches" in str(error), "torch refuses what is no multiple of its rounds"
            continue
        idle, busy = idle_and_busy(config, micro_batches)
        assert idle / (idle + busy) == pytest.approx(bubble_share(spans))
        assert busy == sum(span.stop - span.start for span in spans[0])
        tried += 1
    assert tried > 10


def test_the_bubble_of_a_file(tmp_path):
    (tmp_path / "mine.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    assert idle_and_busy(config_of(2, str(tmp_path / "mine.csv")), 2) == pytest.approx((3, 6))


def test_a_pipeline_divides_weights_and_holds_activations_as_its_schedule_says():
    options = {"data_size": 1, "vocab_size": 101}

    def largest(config, part):
        ranks = range(config.parallel.pipeline_model_parallel_size)
        return max(getattr(m, part) for rank in ranks for m in moments(config, pipe_rank=rank, **options))

    whole, piped = config_of(1), config_of(4)
    assert largest(piped, "weights") < 0.5 * largest(whole, "weights")
    assert largest(config_of(4, "GPipe"), "activations") > 1.5 * largest(piped, "activations")
    assert peak(piped, **options).total == max(
        m.total for rank in range(4) for m in moments(piped, pipe_rank=rank, **options)
    )
    # Gradients stay whole until a schedule has ended.
    assert largest(config_of(4, zero=2), "gradients") == largest(piped, "gradients")
    held = [stage for rank in range(4) for stage in stages_of_rank(piped, 101, rank)]
    assert sum(len(stage.layers) for stage in held) == 9
