"""Mixtures of the choices on 2 and 4 tensor ranks: loss, gradients, cached logits equal the serial model's."""

import dataclasses

import pytest
import torch
from ranks import run_on_ranks

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

VOCABULARY, LENGTH = 61, 8
BASE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    init_method_std=0.2,
    make_vocab_size_divisible_by=8,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    label_smoothing=0.1,
    z_loss=1e-3,
)
ROPE = dataclasses.replace(BASE, position_embedding_type="rope")
CONFIGS = {
    "post-norm": dataclasses.replace(BASE, norm_position="post"),
    "partial interleaved rope, one key/value head": dataclasses.replace(
        ROPE, rotary_percent=0.5, rotary_interleaved=True, num_query_groups=1, activation_func="gelu"
    ),
    "swiglu with biases, two key/value heads": dataclasses.replace(
        ROPE, swiglu=True, normalization="RMSNorm", num_query_groups=2
    ),
    "qkv bias alone, wide heads, no positions": dataclasses.replace(
        BASE, add_bias_linear=False, add_qkv_bias=True, kv_channels=12, position_embedding_type="none"
    ),
    "normed heads without rotation": dataclasses.replace(
        BASE, qk_layernorm=True, normalization="RMSNorm", num_query_groups=2
    ),
    "normed and rotated heads, two key/value heads": dataclasses.replace(
        ROPE, qk_layernorm=True, normalization="RMSNorm", num_query_groups=2, use_rope_scaling=True
    ),
    "untied, squared relu": dataclasses.replace(
        BASE, untie_embeddings_and_output_weights=True, activation_func="squared_relu"
    ),
}


def _batch():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, VOCABULARY, (3, LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:], (torch.rand(3, LENGTH, generator=generator) > 0.2).float()


def _model(config, mesh, **options):
    """A model whose biases and norms too have been moved off their initial values."""
    model = GPT(config, mesh, vocab_size=VOCABULARY, seq_length=LENGTH, seed=3, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if len(parameter.mesh_layout.global_shape) == 1:
                generator = torch.Generator().manual_seed(len(name))
                moved = 0.1 * torch.randn(parameter.mesh_layout.global_shape, generator=generator)
                parameter += parameter.mesh_layout.cut(moved)
    return model


def _results(model):
    tokens, labels, mask = _batch()
    loss = model(tokens, labels, mask)
    loss.backward()
    cache = KeyValueCache(LENGTH)
    logits = torch.cat([model.full_logits(model.logits(part, cache=cache)) for part in tokens.split((3, 1, 4), 1)], 1)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), logits, gradients


def _check(size, references, dtype, loss_tolerance, tolerance):
    mesh = ProcessMesh.create(MeshShape(tensor=size))
    for name, config in CONFIGS.items():
        loss, logits, gradients = references[name]
        for sequence_parallel, loss_chunk_size in ((False, 0), (True, 0), (True, 5)):
            kernels = KernelsConfig(loss_chunk_size=loss_chunk_size)
            model = _model(config, mesh, sequence_parallel=sequence_parallel, kernels=kernels, dtype=dtype)
            our_loss, our_logits, ours = _results(model)
            case = (name, sequence_parallel, loss_chunk_size)
            assert abs(our_loss.item() - loss) <= loss_tolerance * loss, case
            assert (our_logits - torch.from_numpy(logits)).norm() <= tolerance * our_logits.norm(), case
            for key, parameter in model.named_parameters():
                layout = parameter.mesh_layout
                reference = torch.from_numpy(gradients[key])[: layout.global_shape[0]]
                difference = (ours[key].float() - layout.cut(reference)).norm()
                # A rank's part is measured by what is usual for a part, for it may be nearly zero itself.
                usual = reference.norm() * (layout.cut(reference).numel() / reference.numel()) ** 0.5
                assert difference <= tolerance * usual, (case, key, difference / usual)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "tolerance"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 8e-2)]
)
def test_equals_serial(size, dtype, loss_tolerance, tolerance):
    """The reference is fp32 in either case; bf16 alone on one rank is as far from it."""
    references = {}
    for name, config in CONFIGS.items():
        loss, logits, gradients = _results(_model(config, ProcessMesh.create(MeshShape())))
        references[name] = loss.item(), logits.numpy(), {key: value.numpy() for key, value in gradients.items()}
    run_on_ranks(_check, size, size, references, dtype, loss_tolerance, tolerance)


@pytest.mark.parametrize("name", ["post-norm", "untied, squared relu"])
def test_padding_of_the_vocabulary_touches_nothing(name):
    config = CONFIGS[name]
    plain, disturbed = (_model(config, ProcessMesh.create(MeshShape())) for _ in range(2))
    with torch.no_grad():
        assert (disturbed.head.weight[VOCABULARY:] == 0).all()
        disturbed.head.weight[VOCABULARY:] = 1e3
    tokens, labels, _ = _batch()
    expected, results = _results(plain), _results(disturbed)
    assert torch.equal(expected[0], results[0]) and torch.equal(expected[1], results[1])
    assert expected[1].shape[-1] == VOCABULARY
    for key, gradient in expected[2].items():
        assert torch.equal(gradient, results[2][key]), key
    assert (disturbed.head.weight.grad[VOCABULARY:] == 0).all()
    for value, reference in zip(
        disturbed.token_losses(tokens, labels), plain.token_losses(tokens, labels), strict=True
    ):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("name", ["post-norm", "untied, squared relu"])
@pytest.mark.parametrize("loss_chunk_size", [1, 24, 1000])
def test_a_loss_made_of_chunks_is_the_same(name, loss_chunk_size):
    config, mesh = CONFIGS[name], ProcessMesh.create(MeshShape())
    whole, chunked = (_model(config, mesh, kernels=KernelsConfig(loss_chunk_size=n)) for n in (0, loss_chunk_size))
    expected, results = _results(whole), _results(chunked)
    assert results[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for key, gradient in expected[2].items():
        assert (results[2][key] - gradient).norm() <= 2e-6 * gradient.norm(), key
    tokens, labels, mask = _batch()
    losses, correct = whole.token_losses(tokens, labels)
    our_losses, ours_correct = chunked.token_losses(tokens, labels)
    assert torch.equal(ours_correct, correct) and torch.allclose(our_losses, losses, rtol=1e-6)
    chunked.eval()
    assert chunked(tokens, labels, mask).item() == pytest.approx((losses * mask).sum().item(), rel=1e-6)
