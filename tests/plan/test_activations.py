"""The closed form against torch's allocator, over the model itself."""

import dataclasses
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from ranks import run_on_ranks

from megatron_lite.config.data import DataConfig
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute
from megatron_lite.plan.activations import plan_activations
from megatron_lite.plan.memory import moments

VOCAB = 500
DEFAULT, SERIAL = KernelsConfig(), ParallelConfig()
LEAN = KernelsConfig(memory_efficient_layer_norm=True)
GPT2 = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
LLAMA = GPT2 | {
    "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False,
    "ffn_hidden_size": 160, "num_query_groups": 2, "untie_embeddings_and_output_weights": True,
}  # fmt: skip

QWEN3 = LLAMA | {"qk_layernorm": True, "kv_channels": 32}


def measured(config, mesh=None):
    """(bytes alive after forward, highest in backward) of a model's second micro-batch, gradients apart."""
    torch.manual_seed(0)
    training = config.training
    recompute = Recompute(training.recompute_granularity, training.recompute_method, training.recompute_num_layers)
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    model = GPT(
        config.model, mesh or ProcessMesh(MeshShape(), 0), vocab_size=VOCAB, seq_length=config.data.seq_length,
        kernels=config.kernels, context_exchange=config.parallel.cp_comm_type, recompute=recompute, seed=1, dtype=dtype,
    ).train()  # fmt: skip
    tokens = torch.randint(0, VOCAB, (training.micro_batch_size, config.data.seq_length))
    batch = (tokens, tokens.roll(1, 1), torch.ones_like(tokens, dtype=torch.float32))
    model(*batch, dropout_seed=3).backward()
    with Allocations() as allocations:
        allocations.mark("start")
        loss = model(*batch, dropout_seed=4)
        allocations.mark("forward done")
        loss.backward()
        allocations.mark("backward done")
    return allocations.alive("forward done"), allocations.peak("forward done", "backward done")


def run_config(model, *, bf16=False, batch=2, seq_length=128, kernels=DEFAULT, parallel=SERIAL, **training):
    return RunConfig(
        model=ModelConfig(**model),
        precision=PrecisionConfig(bf16=bf16),
        kernels=kernels,
        parallel=parallel,
        data=DataConfig(seq_length=seq_length),
        training=TrainingConfig(micro_batch_size=batch, **training),
    )


CASES = {
    "gpt2": run_config(GPT2),
    "gpt2, one sequence": run_config(GPT2, batch=1),
    "gpt2 bf16": run_config(GPT2, bf16=True),
    "gpt2 hidden dropout": run_config(GPT2 | {"hidden_dropout": 0.1}),
    "gpt2 attention dropout": run_config(GPT2 | {"attention_dropout": 0.1}),
    "gpt2 attention dropout bf16": run_config(GPT2 | {"attention_dropout": 0.1}, bf16=True),
    "gpt2 attention dropout selective": run_config(
        GPT2 | {"attention_dropout": 0.1}, recompute_granularity="selective"
    ),
    "gpt2 attention dropout bf16 by torch": run_config(
        GPT2 | {"attention_dropout": 0.1}, bf16=True, kernels=KernelsConfig(attention_backend="sdpa")
    ),
    "gpt2 fused softmax": run_config(GPT2, kernels=KernelsConfig(attention_backend="fused_softmax")),
    "gpt2 fused softmax bf16": run_config(
        GPT2, bf16=True, batch=1, kernels=KernelsConfig(attention_backend="fused_softmax")
    ),
    "gpt2 loss by chunks": run_config(GPT2, kernels=KernelsConfig(loss_chunk_size=100)),
    "llama loss by chunks bf16": run_config(LLAMA, bf16=True, kernels=KernelsConfig(loss_chunk_size=100)),
    "gpt2 post-norm": run_config(GPT2 | {"norm_position": "post"}),
    "gpt2 relu": run_config(GPT2 | {"activation_func": "relu"}),
    "gpt2 squared relu": run_config(GPT2 | {"activation_func": "squared_relu"}),
    "gpt2 wide heads": run_config(GPT2 | {"kv_channels": 24}),
    "llama": run_config(LLAMA),
    "qwen3": run_config(QWEN3),
    "qwen3 bf16": run_config(QWEN3, bf16=True),
    "qwen3 fused softmax": run_config(QWEN3, kernels=KernelsConfig(attention_backend="fused_softmax")),
    "qwen3 lean norms bf16": run_config(QWEN3, bf16=True, kernels=LEAN),
    "qwen3 norms by torch bf16": run_config(QWEN3, bf16=True, kernels=KernelsConfig(norm_backend="torch")),
    "gpt2 normed heads": run_config(GPT2 | {"qk_layernorm": True}),
    "gpt2 normed heads, lean": run_config(GPT2 | {"qk_layernorm": True}, kernels=LEAN),
    "llama bf16": run_config(LLAMA, bf16=True),
    "llama dropout bf16": run_config(LLAMA | {"hidden_dropout": 0.1}, bf16=True),
    "llama fused softmax": run_config(LLAMA, kernels=KernelsConfig(attention_backend="fused_softmax")),
    "gpt2 norms by torch bf16": run_config(GPT2, bf16=True, kernels=KernelsConfig(norm_backend="torch")),
    "gpt2 lean norms": run_config(GPT2, kernels=LEAN),
    "gpt2 lean norms after": run_config(GPT2 | {"norm_position": "post"}, kernels=LEAN),
    "llama lean norms bf16": run_config(LLAMA, bf16=True, kernels=LEAN),
    "llama lean norms, groups of 3": run_config(
        LLAMA, recompute_granularity="full", recompute_num_layers=3, kernels=LEAN
    ),
    "llama norms by torch": run_config(LLAMA, kernels=KernelsConfig(norm_backend="torch")),
    "llama norms by torch bf16": run_config(LLAMA, bf16=True, kernels=KernelsConfig(norm_backend="torch")),
    "llama full": run_config(LLAMA, recompute_granularity="full"),
    "llama full, groups of 3": run_config(LLAMA, recompute_granularity="full", recompute_num_layers=3),
    "gpt2 full, a block of 1": run_config(
        GPT2, recompute_granularity="full", recompute_method="block", recompute_num_layers=1
    ),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_what_forward_keeps(config):
    alive, _ = measured(config)
    planned = plan_activations(config, vocab_size=VOCAB).kept
    assert planned == pytest.approx(alive, rel=0.02)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_highest_moment_of_backward(config):
    _, highest = measured(config)
    # Two micro-batches a step: gradients are there before the second one's forward.
    accumulating = dataclasses.replace(
        config,
        parallel=ParallelConfig(zero_stage=1 if config.precision.bf16 else 0),
        training=dataclasses.replace(config.training, global_batch_size=2 * config.training.micro_batch_size),
    )
    planned = max(
        moment.activations + moment.temporary
        for moment in moments(accumulating, data_size=1, vocab_size=VOCAB)
        if moment.name.startswith("backward")
    )
    # On a CPU a product of 16-bit numbers takes scratch, which is small beside a real model's tensors.
    assert planned == pytest.approx(highest, rel=0.08 if config.precision.bf16 else 0.05)


RING = ParallelConfig(context_parallel_size=2)
CONTEXT_CASES = {
    "qwen3 ring": run_config(QWEN3, seq_length=256, parallel=RING),
    "qwen3 all-to-all": run_config(QWEN3, seq_length=256, parallel=dataclasses.replace(RING, cp_comm_type="a2a")),
    "llama ring bf16": run_config(LLAMA, bf16=True, seq_length=256, parallel=RING),
    "gpt2 ring fused softmax": run_config(
        GPT2, seq_length=256, kernels=KernelsConfig(attention_backend="fused_softmax"), parallel=RING
    ),
    "gpt2 all-to-all": run_config(GPT2, seq_length=256, parallel=dataclasses.replace(RING, cp_comm_type="a2a")),
}


def _measured_by_two(config):
    """Exchanges are waited for until gloo's thread has let go of them: what it frees last is not seen to be freed."""
    exchange = dist.all_to_all_single

    def patiently(*arguments, **options):
        exchange(*arguments, **options)
        time.sleep(0.05)

    with mock.patch.object(dist, "all_to_all_single", patiently):
        return measured(config, ProcessMesh.create(MeshShape(context=2)))


@pytest.mark.parametrize("config", CONTEXT_CASES.values(), ids=CONTEXT_CASES)
def test_shared_sequences_keep_a_share(config):
    for alive, highest in run_on_ranks(_measured_by_two, 2, config):
        assert plan_activations(config, vocab_size=VOCAB).kept == pytest.approx(alive, rel=0.02)
        accumulating = dataclasses.replace(
            config,
            parallel=dataclasses.replace(config.parallel, zero_stage=1 if config.precision.bf16 else 0),
            training=dataclasses.replace(config.training, global_batch_size=2 * config.training.micro_batch_size),
        )
        planned = max(
            moment.activations + moment.temporary
            for moment in moments(accumulating, data_size=1, vocab_size=VOCAB)
            if moment.name.startswith("backward")
        )
        assert planned == pytest.approx(highest, rel=0.1)
