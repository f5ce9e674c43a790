import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import override, read_preset
from megatron_lite.model.gpt import GPT
from megatron_lite.optim.groups import default_rules, parameter_groups
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.optimizer import is_coded
from megatron_lite.plan.parameters import COMPONENTS, count_parameters, padded_vocab_size, parameter_shapes

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "examples/models").glob("*.yaml"))
# As Hugging Face's model classes of the published checkpoints count them.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
}


def preset(name):
    return override(RunConfig(), read_preset(name))


def test_every_preset_is_counted():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    config = preset(name)
    count = count_parameters(config.model, vocab_size=config.model.vocab_size, seq_length=config.data.seq_length)
    assert count.total == count.trainable == PUBLISHED[name]
    assert sum(count.by_component.values()) == count.total
    assert list(count.by_component) == [part for part in COMPONENTS if part in count.by_component]


def test_parts_of_gpt2_by_hand():
    config = preset("gpt2-124m")
    count = count_parameters(config.model, vocab_size=50257, seq_length=1024)
    assert count.by_component == {
        "word embedding": 50257 * 768,
        "position embedding": 1024 * 768,
        "attention": 12 * (4 * 768 * 768 + 4 * 768),
        "feed-forward": 12 * (2 * 768 * 3072 + 3072 + 768),
        "norms": 25 * 2 * 768,
    }
    assert count.without_embedding == 85_056_000
    # 50,304 rows in memory.
    assert count.on_rank == count.total + 47 * 768


def test_tensor_ranks_share_matrices_and_replicate_the_rest():
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=2, swiglu=True, add_bias_linear=True,
        ffn_hidden_size=96, normalization="RMSNorm", position_embedding_type="rope",
        untie_embeddings_and_output_weights=True, make_vocab_size_divisible_by=16,
    )  # fmt: skip
    local = {
        shape.name: shape.local_shape
        for shape in parameter_shapes(config, vocab_size=100, seq_length=32, tensor_size=4)
    }
    assert local["embedding.word.weight"] == local["head.weight"] == (32, 64)
    assert local["layers.1.attention.query.weight"] == (16, 64)
    # Two key/value heads on four ranks: each rank holds one of them.
    assert local["layers.1.attention.key_value.weight"] == (16, 64)
    assert local["layers.1.attention.key_value.bias"] == (16,)
    assert local["layers.1.attention.output.weight"] == (64, 16)
    assert local["layers.1.attention.output.bias"] == (64,)
    assert local["layers.1.mlp.gate_up.weight"] == (48, 64)
    assert local["layers.1.mlp.down.weight"] == (64, 24)
    assert local["final_norm.weight"] == (64,)


@pytest.mark.parametrize(("vocab", "size", "rows"), [(50257, 1, 50304), (50257, 8, 51200), (50304, 1, 50304)])
def test_vocabulary_padding(vocab, size, rows):
    assert padded_vocab_size(vocab, 128, size) == rows


def test_the_planner_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import megatron_lite.plan.report, megatron_lite.plan.devices, megatron_lite.plan.memory"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


VARIANTS = {
    "post-norm, no positions": {"norm_position": "post", "position_embedding_type": "none"},
    "biases with rope and swiglu": {"swiglu": True, "position_embedding_type": "rope", "ffn_hidden_size": 96},
    "query biases alone": {"add_bias_linear": False, "add_qkv_bias": True, "normalization": "RMSNorm"},
    "wide heads, few groups, own head": {
        "kv_channels": 24, "num_query_groups": 2, "untie_embeddings_and_output_weights": True,
    },
    "normed heads": {"qk_layernorm": True, "kv_channels": 24, "num_query_groups": 2},
}  # fmt: skip


def shape_of(name):
    """(model, vocabulary, sequence length) of a preset or variant."""
    if name in VARIANTS:
        return ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=8, **VARIANTS[name]), 1001, 32
    config = preset(name)
    return config.model, config.model.vocab_size, config.data.seq_length


@pytest.mark.parametrize(
    ("name", "tensor_size"),
    [
        (name, size)
        for name in [*PRESETS, *VARIANTS]
        for size in (1, 2, 4, 5, 8)
        if shape_of(name)[0].num_attention_heads % size == 0
    ],
)
def test_the_closed_form_is_the_model(name, tensor_size):
    model, vocab, length = shape_of(name)
    planned = list(parameter_shapes(model, vocab_size=vocab, seq_length=length, tensor_size=tensor_size))
    mesh = ProcessMesh(MeshShape(tensor=tensor_size), rank=tensor_size - 1)
    built = GPT(model, mesh, vocab_size=vocab, seq_length=length, device="meta")
    assert {shape.name: (shape.shape, shape.local_shape) for shape in planned} == {
        name: (parameter.mesh_layout.global_shape, tuple(parameter.shape))
        for name, parameter in built.named_parameters()
    }
    vectors = re.compile(default_rules(OptimizerConfig())[0].pattern)
    assert all(shape.is_vector == bool(vectors.search(shape.name)) for shape in planned)
    narrow = OptimizerConfig(optimizer="adamw8bit")
    groups = parameter_groups(built.named_parameters(), default_rules(narrow))
    coded = {id(parameter) for group in groups if group["bits"] == 8 for parameter in group["params"]}
    assert {shape.name for shape in planned if is_coded(narrow, shape)} == {
        name for name, parameter in built.named_parameters() if id(parameter) in coded
    }
