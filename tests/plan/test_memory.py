"""The closed form of a rank's memory, term by term; test_measured_peak.py holds the sum."""

import dataclasses

from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.plan.activations import plan_activations
from megatron_lite.plan.memory import State, checkpoint_bytes, micro_batches, moments, peak, plan_state

VOCAB = 3000


def test_accumulation_is_planned_by_either_flag():
    for given in ({"global_batch_size": 24}, {"gradient_accumulation_steps": 4}):
        assert micro_batches(RunConfig(training=TrainingConfig(micro_batch_size=2, **given)), 3) == 4


def run_config(stage, *, bf16=False, optimizer="adamw"):
    return RunConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=256, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0
        ),
        parallel=ParallelConfig(zero_stage=stage),
        precision=PrecisionConfig(bf16=bf16),
        optimizer=OptimizerConfig(optimizer=optimizer),
        data=DataConfig(seq_length=64),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4),
    )


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


def test_a_tied_output_layer_costs_its_gradient_three_times():
    """Its own, which waits through the layers, the embedding's, and their sum."""

    def last(**model):
        config = run_config(1)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
        found = {moment.name: moment for moment in moments(config, data_size=1, vocab_size=VOCAB)}
        return found["backward of the layers"].temporary, found["backward of the embedding"].temporary

    tied, untied = last(), last(untie_embeddings_and_output_weights=True)
    vocabulary = 4 * 256 * 3072
    assert tied[0] - untied[0] == vocabulary
    assert tied[1] == 3 * untied[1] == 3 * vocabulary


def test_stage_3_reduces_a_full_bucket_within_backward_or_what_there_is_at_the_end():
    def temporary(bucket, device_type="cpu"):
        found = moments(
            run_config(3), data_size=1, vocab_size=VOCAB, device_type=device_type, reduce_bucket_size=bucket
        )
        return {moment.name: moment.temporary for moment in found}

    whole = temporary(10**9)
    elements = 3072 * 256 + 64 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256
    # The bucket, laid out by ranks, and gloo's copy.
    assert whole["reducing gradients"] == 3 * 4 * elements
    assert whole["backward of the embedding"] == 4 * elements + 3 * 4 * 3072 * 256
    small = temporary(10**6)
    assert small["reducing gradients"] == 3 * 4 * 10**6
    assert small["backward of the embedding"] == 4 * 10**6 + 8 * 10**6 + 3 * 4 * 3072 * 256
    assert temporary(10**6, "cuda")["reducing gradients"] == 2 * 4 * 10**6


def test_weights_are_gathered_by_several_data_ranks_alone():
    def names(stage, data_size, device_type="cpu"):
        found = moments(run_config(stage), data_size=data_size, vocab_size=VOCAB, device_type=device_type)
        return [moment.name for moment in found]

    assert "gathering weights" in names(1, 2) and "gathering weights" in names(2, 2)
    assert not any("gathering weights" in found for found in (names(1, 1), names(3, 2), names(1, 2, "cuda")))
    alone, shared = ({m.name: m for m in moments(run_config(3), data_size=size, vocab_size=VOCAB)} for size in (1, 2))
    elements = 3072 * 256 + 64 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256
    head = "backward of the output layer"
    assert shared[head].temporary - alone[head].temporary == 4 * elements
    # The bucket, whole weights, and the buffer they came in.
    assert shared["forward of the layers"].temporary == 3 * 4 * elements and "forward of the layers" not in alone
