import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import override, read_preset
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.flops import flops_per_token, forward_flops_per_token
from megatron_lite.plan.parameters import parameter_shapes


def test_gpt2_by_hand():
    # A layer: 4 projections of 768 x 768, 2 x 1,024 x 768 of attention, 2 matrices of 768 x 3,072.
    layer = 2 * (4 * 589_824 + 2 * 786_432 + 2 * 2_359_296)
    model = override(RunConfig(), read_preset("gpt2-124m")).model
    assert forward_flops_per_token(model, vocab_size=50257, seq_length=1024) == 12 * layer + 2 * 768 * 50257
    assert flops_per_token(model, vocab_size=50257, seq_length=1024) == 854_438_400


def test_llama_8b_by_hand():
    # Grouped queries: 32 query and 8 key/value heads of 128; SwiGLU: 3 matrices of 4,096 x 14,336.
    matrices = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14336
    forward = 32 * (2 * matrices + 2 * 2 * 8192 * 4096) + 2 * 4096 * 128256
    model = override(RunConfig(), read_preset("llama-8b")).model
    assert flops_per_token(model, vocab_size=128256, seq_length=8192) == 3 * forward
    half = flops_per_token(model, vocab_size=128256, seq_length=8192, causal=True)
    assert half == 3 * (forward - 32 * 2 * 8191 * 4096)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_palms_convention_of_matrices_and_attention(swiglu, tied):
    """6 FLOPs a matrix element and 12 L S N D for attention, with heads wider than hidden / heads."""
    model = ModelConfig(
        num_layers=3, hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=20, swiglu=swiglu,
        ffn_hidden_size=100, untie_embeddings_and_output_weights=not tied,
    )  # fmt: skip
    shapes = parameter_shapes(model, vocab_size=77, seq_length=32)
    multiplied = sum(
        s.elements for s in shapes if not s.is_vector and "embedding" not in s.name and "head." not in s.name
    )
    expected = 6 * (multiplied + 77 * 48) + 12 * 3 * 32 * 4 * 20
    assert flops_per_token(model, vocab_size=77, seq_length=32) == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_torch_counts_the_same_over_the_model(grouped):
    """torch counts matrix products as they run, in forward and backward."""
    vocab, batch, length = 128, 2, 64
    options = {"swiglu": True, "add_bias_linear": False, "num_query_groups": 2} if grouped else {}
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, **options
    )
    model = GPT(config, ProcessMesh(MeshShape(), 0), vocab_size=vocab, seq_length=length, seed=1)
    tokens = torch.randint(0, vocab, (batch, length))
    # The counter does not know the CPU's fused attention, so attention runs as plain products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(tokens, tokens, torch.ones(batch, length))
        forward = counter.get_total_flops()
        loss.backward()
    per_token = forward_flops_per_token(config, vocab_size=vocab, seq_length=length)
    assert forward == batch * length * per_token
    assert (
        counter.get_total_flops()
        == 3 * forward
        == batch * length * flops_per_token(config, vocab_size=vocab, seq_length=length)
    )
