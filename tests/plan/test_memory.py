"""The planned peak against torch's allocator, over the real engines."""

import dataclasses
import gc

import pytest
from allocations import Allocations
from ranks import run_on_ranks

from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.plan.activations import plan_activations
from megatron_lite.plan.memory import State, checkpoint_bytes, micro_batches, peak, plan_state

VOCAB, BUCKET = 3000, 100_000


def test_accumulation_is_planned_by_either_flag():
    for given in ({"global_batch_size": 24}, {"gradient_accumulation_steps": 4}):
        assert micro_batches(RunConfig(training=TrainingConfig(micro_batch_size=2, **given)), 3) == 4


def run_config(stage, *, bf16=False, accumulate=2, batch=2, optimizer="adamw", **training):
    return RunConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=256, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0
        ),
        parallel=ParallelConfig(zero_stage=stage),
        precision=PrecisionConfig(bf16=bf16),
        optimizer=OptimizerConfig(optimizer=optimizer),
        data=DataConfig(seq_length=64),
        training=TrainingConfig(micro_batch_size=batch, global_batch_size=batch * accumulate, **training),
    )


CASES = {
    "replica": run_config(0),
    "replica, one micro-batch": run_config(0, accumulate=1),
    "stage 1": run_config(1),
    "stage 1, large batch, full recompute": run_config(1, batch=16, recompute_granularity="full"),
    "stage 2": run_config(2),
    "stage 2, one micro-batch": run_config(2, accumulate=1),
    "stage 3": run_config(3),
    "stage 1 bf16, large batch": run_config(1, bf16=True, batch=16),
    "stage 2 bf16": run_config(2, bf16=True),
    "stage 3 bf16": run_config(3, bf16=True),
    "replica, 8-bit state": run_config(0, optimizer="adamw8bit"),
    "stage 1, 8-bit state": run_config(1, optimizer="adamw8bit"),
    "stage 3 bf16, 8-bit state": run_config(3, bf16=True, optimizer="adamw8bit"),
}


def measured_peaks(cases):
    """The most bytes alive in two steps of each configuration, on one rank."""
    import torch

    from megatron_lite.model.gpt import GPT
    from megatron_lite.optim.build import build_optimizer
    from megatron_lite.optim.groups import default_rules, parameter_groups
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.parallel.recompute import Recompute
    from megatron_lite.train.deepspeed_config import derive
    from megatron_lite.train.engine import ReplicaEngine, ZeroEngine

    mesh = ProcessMesh.create(MeshShape())
    found = {}
    for name, config in cases.items():
        training, length = config.training, config.data.seq_length
        with Allocations() as allocations:
            allocations.mark("start")
            recompute = Recompute(training.recompute_granularity)
            model = GPT(config.model, mesh, vocab_size=VOCAB, seq_length=length, recompute=recompute, seed=1).train()
            groups = parameter_groups(model.named_parameters(), default_rules(config.optimizer))
            optimizer = build_optimizer(config.optimizer, groups)
            if config.parallel.zero_stage == 0:
                engine = ReplicaEngine(model, mesh, optimizer, config.optimizer.slots, 1.0)
            else:
                settings = derive(config)
                settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
                engine = ZeroEngine(model, mesh, optimizer, config.optimizer.slots, settings)
            count = micro_batches(config, 1)
            allocations.mark("first step")
            for _ in range(2):
                with engine.gradients(count) as backward:
                    for _ in range(count):
                        tokens = torch.randint(0, VOCAB, (training.micro_batch_size, length))
                        backward(engine.forward(tokens, tokens, torch.ones(tokens.shape)) / tokens.numel())
                engine.step(1e-3)
            allocations.mark("end")
        found[name] = allocations.peak("first step", "end")
        del engine, model, optimizer, groups, backward
        # Hooks tie knots; what is let go during the next case would be missing from its count.
        gc.collect()
    return found


@pytest.fixture(scope="module")
def measured():
    return run_on_ranks(measured_peaks, 1, CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step(measured, name):
    planned = peak(CASES[name], data_size=1, vocab_size=VOCAB, reduce_bucket_size=BUCKET)
    # Stage 3 frees some of its buffers on gloo's threads, which the count does not see.
    tolerance = 0.15 if CASES[name].parallel.zero_stage == 3 else 0.1
    assert planned.total == pytest.approx(measured[name], rel=tolerance), planned


def test_state_shrinks_with_the_data_ranks_as_the_stage_says():
    # 1,000 elements, 4 data ranks: weights, masters and two moments, gradients.
    state = {stage: plan_state(run_config(stage), 1000, 0, 4) for stage in range(4)}
    assert state[0] == State(weights=4000, optimizer=8000, gradients=4000)
    assert state[1] == State(weights=4000, optimizer=2000, gradients=4000)
    assert state[2] == State(weights=4000, optimizer=3000, gradients=1000)
    assert state[3] == State(weights=1000, optimizer=3000, gradients=1000)
    assert plan_state(run_config(0, bf16=True), 1000, 0, 4) == State(weights=2000, optimizer=3000, gradients=4000)
    plain = dataclasses.replace(run_config(0), optimizer=OptimizerConfig(optimizer="sgd", sgd_momentum=0.0))
    assert plan_state(plain, 1000, 0, 1) == State(weights=4000, optimizer=0, gradients=4000)
    narrow = run_config(2, optimizer="adamw8bit")
    # A quarter each: 4 bytes of master, 8 of fp32 slots, 2.03125 of 8-bit ones.
    assert plan_state(narrow, 1024, 512, 4).optimizer == 256 * 4 + 128 * 8 + 260


def test_tensor_ranks_and_sequence_parallelism_share_activations():
    def kept(tensor, sequence_parallel):
        config = dataclasses.replace(
            run_config(1),
            parallel=ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel),
        )
        return plan_activations(config, vocab_size=VOCAB).layers[0]

    tokens, hidden = 2 * 64, 4 * 256
    # Inputs of the two norms and of the column-parallel layers stay whole; queries, keys, values,
    # output, log-sum-exp and the feed-forward layer are split.
    assert kept(1, False) == tokens * (4 * hidden + 2 * 8 + 4 * hidden + 4 * 4 + 8 * hidden)
    assert kept(4, False) == tokens * (4 * hidden + 2 * 8 + (4 * hidden + 4 * 4 + 8 * hidden) // 4)
    assert kept(4, True) == tokens * (2 * hidden + (2 * hidden + 2 * 8 + 4 * hidden + 4 * 4 + 8 * hidden) // 4)


def test_a_gpu_pays_for_the_whole_bucket_in_stage_3():
    arguments = {"data_size": 2, "vocab_size": VOCAB}
    small = peak(run_config(3), device_type="cuda", reduce_bucket_size=10**7, **arguments)
    large = peak(run_config(3), device_type="cuda", reduce_bucket_size=10**9, **arguments)
    assert large.total - small.total == 4 * (10**9 - 10**7)
    assert peak(run_config(3), reduce_bucket_size=10**9, **arguments).total < small.total


def test_stage_1_reduces_where_the_gradients_are():
    arguments = {"data_size": 2, "vocab_size": VOCAB, "device_type": "cuda"}
    assert peak(run_config(1), reduce_bucket_size=10**9, **arguments) == peak(run_config(1), **arguments)


def test_checkpoints_hold_masters_and_slots():
    assert checkpoint_bytes(run_config(1), 1000, 0) == 12_000
    assert checkpoint_bytes(run_config(1, bf16=True), 1000, 0) == 12_000
    narrow = run_config(1, optimizer="adamw8bit")
    assert checkpoint_bytes(narrow, 2560, 1280) == 4 * 2560 + 8 * 1280 + 2600
