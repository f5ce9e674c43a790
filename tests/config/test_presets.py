"""The model presets: sound configurations whose parameter counts are those of the models they are named for."""

import re

import pytest

from megatron_lite.config import check, sources
from megatron_lite.config.run import RunConfig

COUNTS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "llama-70b": 70_553_706_496,
}


def preset(name: str) -> RunConfig:
    return sources.override(RunConfig(), sources.read_preset(name))


def transformers_count(config: RunConfig) -> int:
    """Parameters of the model of that shape in transformers, built without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = config.model
    if model.position_embedding_type == "rope":
        kinds = {"Qwen2Config": model.add_qkv_bias, "Qwen3Config": model.qk_layernorm, "LlamaConfig": True}
        shape = getattr(transformers, next(kind for kind, holds in kinds.items() if holds))(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        )
    else:
        shape = transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            n_positions=model.max_position_embeddings,
        )
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(shape)
    built.tie_weights()
    return sum(parameter.numel() for parameter in built.parameters())


def test_every_preset_is_counted():
    assert sources.presets() == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_is_the_model_it_is_named_for(name):
    assert transformers_count(preset(name)) == COUNTS[name]
    stated = re.search(r"([\d,]+) parameters", (sources.PRESET_FOLDER / f"{name}.yaml").read_text())
    assert stated and int(stated[1].replace(",", "")) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_sets_the_model_alone_and_is_sound(name):
    overrides = sources.read_preset(name)
    assert set(overrides) == {"model", "data"} and set(overrides["data"]) == {"seq_length"}
    config = sources.override(preset(name), {"training": {"train_iters": 1}})
    assert check.problems(config, 1) == []
