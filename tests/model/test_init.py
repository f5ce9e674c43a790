"""Initial weights: the same global tensors under every layout, with the deviations asked for."""

import dataclasses

import pytest
import torch
from pasting import paste

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.parameters import parameter_shapes

VOCABULARY, LENGTH = 203, 16
GPT2 = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
LLAMA = dataclasses.replace(
    GPT2,
    num_query_groups=2,
    normalization="RMSNorm",
    position_embedding_type="rope",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
MIXTURE = dataclasses.replace(LLAMA, norm_position="post", add_qkv_bias=True, num_query_groups=1)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "mixture": MIXTURE}


def _model(config, size=1, rank=0, seed=1, **options):
    mesh = ProcessMesh(MeshShape(tensor=size), rank)
    return GPT(config, mesh, vocab_size=VOCABULARY, seq_length=LENGTH, seed=seed, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init_method", ["normal", "xavier_uniform"])
def test_every_layout_starts_equal(family, init_method):
    config = dataclasses.replace(FAMILIES[family], init_method=init_method)
    serial = {name: p.mesh_layout.cut(p.data[: p.mesh_layout.global_shape[0]]) for name, p in _named(_model(config))}
    for size in (2, 4):
        models = [_model(config, size, rank) for rank in range(size)]
        for name, first in _named(models[0]):
            joined = torch.full(first.mesh_layout.global_shape, float("nan"))
            for model in models:
                local = model.get_parameter(name)
                paste(local.mesh_layout, local.data, joined)
                assert torch.equal(local.data, local.mesh_layout.cut(joined.nan_to_num())), name
            assert torch.equal(joined, serial[name][: joined.shape[0]]), name


def _named(model):
    return list(model.named_parameters())


def test_deviations_and_constants():
    weights = dict(_named(_model(GPT2)))
    for name, expected in {
        "embedding.word.weight": 0.02,
        "embedding.position.weight": 0.02,
        "layers.1.attention.query.weight": 0.02,
        "layers.1.attention.output.weight": 0.01,
        "layers.1.mlp.up.weight": 0.02,
        "layers.1.mlp.down.weight": 0.01,
    }.items():
        weight = weights[name][: weights[name].mesh_layout.global_shape[0]]
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif name.endswith("norm.weight"):
            assert (weight == 1).all()
    assert (weights["embedding.word.weight"][VOCABULARY:] == 0).all()
    # Two weights of one shape are not one draw, nor is one weight under two seeds.
    assert not torch.equal(weights["layers.0.mlp.up.weight"], weights["layers.1.mlp.up.weight"])
    other = dict(_named(_model(GPT2, seed=2)))
    assert not torch.equal(weights["layers.0.mlp.up.weight"], other["layers.0.mlp.up.weight"])


def test_xavier_bound():
    weights = dict(_named(_model(dataclasses.replace(LLAMA, init_method="xavier_uniform"))))
    bound = (6 / (64 + 2 * LLAMA.ffn_size)) ** 0.5
    largest = weights["layers.0.mlp.gate_up.weight"].abs().max().item()
    assert 0.99 * bound < largest <= bound
    assert weights["embedding.word.weight"][:VOCABULARY].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 4])
def test_the_planner_knows_every_parameter(family, size):
    config = FAMILIES[family]
    planned = {
        shape.name: (shape.shape, shape.local_shape)
        for shape in parameter_shapes(config, vocab_size=VOCABULARY, seq_length=LENGTH, tensor_size=size)
    }
    model = _model(config, size, rank=size - 1, device="meta")
    built = {name: (p.mesh_layout.global_shape, p.mesh_layout.local_shape) for name, p in _named(model)}
    assert built == planned
    assert all(p.is_meta and tuple(p.shape) == p.mesh_layout.local_shape for _, p in _named(model))


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 3), (6, 3, 2), (6, 3, 4), (4, 3, 1)])
def test_heads_are_shared_out_whole_or_not_at_all(heads, groups, size):
    # 6 x 16 channels would split evenly over 4 ranks, but not whole heads.
    config = dataclasses.replace(LLAMA, hidden_size=16 * heads, num_attention_heads=heads, num_query_groups=groups)
    with pytest.raises(ValueError, match=f"{heads} query heads and {groups} key/value heads .* over {size} ranks"):
        _model(config, size, device="meta")
