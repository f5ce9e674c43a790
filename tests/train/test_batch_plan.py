"""The batch plan: the closed form against a walk, step by step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import override
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError
from megatron_lite.train.batch_plan import BatchPlan, samples_of_run


def batch_size_at(training: TrainingConfig, consumed: int) -> int:
    """Megatron-LM's rule as it is told: equal parts of the ramp, one increment each."""
    start, increment, samples = training.rampup_batch_size
    if consumed > samples:
        return training.global_batch_size
    parts = (training.global_batch_size - start) // increment
    return start + consumed * parts // samples * increment


@given(
    unit=st.integers(1, 4),
    start=st.integers(1, 8),
    increment=st.integers(1, 5),
    parts=st.integers(1, 12),
    samples=st.integers(1, 2000),
    iterations=st.integers(1, 300),
)
def test_a_ramp_up_equals_a_walk(unit, start, increment, parts, samples, iterations):
    training = TrainingConfig(
        global_batch_size=unit * (start + increment * parts),
        rampup_batch_size=(unit * start, unit * increment, samples),
        train_iters=iterations,
    )
    plan = BatchPlan.of(training, data_size=unit, seq_length=8)
    consumed = 0
    for iteration in range(iterations):
        size = batch_size_at(training, consumed)
        assert plan.global_batch_size(consumed) == size
        assert plan.micro_batches(consumed) * unit == size
        assert plan.iteration_of(consumed) == plan.iteration_of(consumed + size - 1) == iteration
        assert plan.consumed_at(iteration) == consumed
        consumed += size
    assert (plan.total_iterations, plan.total_samples) == (iterations, consumed)
    by_samples = dataclasses.replace(training, train_iters=None, train_samples=consumed)
    assert BatchPlan.of(by_samples, unit, 8) == plan


def test_a_longer_run_changes_nothing_earlier():
    training = TrainingConfig(global_batch_size=32, rampup_batch_size=(4, 4, 1000), train_iters=50)
    short, long = (BatchPlan.of(dataclasses.replace(training, train_iters=n), 2, 8) for n in (50, 5000))
    assert short.stages == long.stages


@pytest.mark.parametrize(
    ("length", "iterations"),
    [
        ({"train_iters": 7}, 7),
        ({"train_samples": 71}, 8),
        ({"train_tokens": 71 * 16 + 15}, 8),
        ({"train_epochs": 2.5}, 31),
        ({"train_samples": 71, "train_tokens": 72 * 16}, 8),
        ({"train_samples": 73, "train_tokens": 72 * 16 - 1}, 8),
        ({"train_samples": 73, "train_tokens": 72 * 16}, 9),
    ],
)
def test_a_length_is_rounded_down_to_whole_steps(length, iterations):
    plan = BatchPlan.of(TrainingConfig(global_batch_size=8, **length), 2, 16, samples_per_epoch=100)
    assert (plan.total_iterations, plan.total_samples) == (iterations, 8 * iterations)


def test_counts_stay_exact_beyond_floating_point():
    tokens = 15 * 10**12 + 2**13
    plan = BatchPlan.of(TrainingConfig(global_batch_size=2048, train_tokens=tokens), 128, 8192)
    assert plan.total_samples == tokens // 8192 // 2048 * 2048


def test_a_run_shorter_than_one_step_is_an_error():
    with pytest.raises(ConfigError, match="7 samples long, but one step takes 8"):
        BatchPlan.of(TrainingConfig(global_batch_size=8, train_samples=7), 1, 16)


def test_the_batch_defaults_to_one_micro_batch_a_data_rank():
    plan = BatchPlan.of(TrainingConfig(micro_batch_size=3, train_iters=1), 4, 16)
    assert plan.global_batch_size(0) == 12 and plan.micro_batches(0) == 1


def test_accumulation_steps_make_the_batch_and_a_resolved_one_is_in_sequences():
    training = TrainingConfig(micro_batch_size=3, gradient_accumulation_steps=5, train_iters=1)
    plan = BatchPlan.of(training, 4, 16)
    assert plan.global_batch_size(0) == 60 and plan.micro_batches(0) == 5
    resolved = plan.resolve(override(RunConfig(), {"training": dataclasses.asdict(training)}), 100).training
    assert (resolved.global_batch_size, resolved.gradient_accumulation_steps) == (60, None)
    assert BatchPlan.of(resolved, 2, 16).micro_batches(0) == 10


def test_numbers_are_told_as_sums():
    training = TrainingConfig(micro_batch_size=4, global_batch_size=256, train_iters=10)
    assert BatchPlan.of(training, 8, 2048).lines() == [
        "524,288 tokens a step = 4 sequences x 2,048 x 8 data ranks x 8 micro-batches",
        "5,242,880 tokens in all = 2,560 sequences x 2,048, in 10 steps",
    ]
    ramp = dataclasses.replace(training, rampup_batch_size=(128, 64, 1000))
    assert BatchPlan.of(ramp, 8, 2048).lines()[1] == (
        "the batch grows from 128 to 256 sequences over the first 1,088 samples = 7 steps"
    )


def test_a_run_ends_before_its_data_do():
    training = TrainingConfig(train_iters=100, global_batch_size=8)
    assert BatchPlan.of(training, 1, 32, available=83).total_samples == 80
    assert BatchPlan.of(training, 1, 32, available=8000).total_samples == 800
    assert samples_of_run(training, 1, 32) == 800
    assert samples_of_run(TrainingConfig(train_epochs=2.0), 1, 32) is None


@pytest.mark.parametrize("available", [-5, 0, 7])
def test_data_that_end_before_a_step_are_told_from_a_short_run(available):
    training = TrainingConfig(global_batch_size=8, train_iters=10)
    with pytest.raises(ConfigError, match=rf"data end after {max(0, available)} samples, .*--skip-samples .* takes 8"):
        BatchPlan.of(training, 1, 16, available=available)
