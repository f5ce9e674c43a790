"""config.json of Hugging Face's families, to our configuration and back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron_lite.config import cli, huggingface, sources
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
    "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PRESETS = {
    "gpt2-355m": "gpt2", "llama-7b": "llama", "llama-8b": "llama", "llama3.1-8b": "llama", "mistral-7b": "llama",
    "qwen2.5-0.5b": "qwen2", "qwen3-0.6b": "qwen3",
}  # fmt: skip


def written(model: ModelConfig, family: str) -> dict:
    return huggingface.config_json(
        model,
        family,
        vocab_size=model.vocab_size,
        positions=model.max_position_embeddings,
        dtype="float32",
        bos=1,
        eos=2,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_there_and_comes_back(name):
    model = sources.override(RunConfig(), sources.read_preset(name)).model
    family = huggingface.family_of(model)
    assert family == PRESETS[name]
    there = huggingface.describe(json.loads(json.dumps(written(model, family))), "x")
    assert there.model.computation == model.computation
    for field in ("vocab_size", "max_position_embeddings", "hidden_dropout", "attention_dropout", "init_method_std"):
        assert getattr(there.model, field) == getattr(model, field)


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_understands_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    model = sources.override(RunConfig(), sources.read_preset(name)).model
    content = written(model, PRESETS[name])
    theirs = transformers.AutoConfig.for_model(**content)
    rope = theirs.to_dict().get("rope_parameters") or {}
    if model.position_embedding_type == "rope":
        assert rope["rope_theta"] == model.rotary_base and rope["rope_type"] == (
            "llama3" if model.use_rope_scaling else "default"
        )
        assert not model.use_rope_scaling or rope["original_max_position_embeddings"] == 8192
    # And what it writes itself, whatever the version, means the same.
    assert huggingface.describe(json.loads(theirs.to_json_string()), "x").model.computation == model.computation


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama", "gpt2"])
def test_what_is_left_out_has_the_familys_default(family):
    transformers = pytest.importorskip("transformers")
    sizes = GPT2 if family == "gpt2" else LLAMA
    bare = {**sizes, "model_type": family}
    full = json.loads(transformers.AutoConfig.for_model(**bare).to_json_string())
    assert huggingface.describe(bare, "x").model == huggingface.describe(full, "x").model


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "model_type is 'None'"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral', and only gpt2, llama"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True and mlp_bias is False; both, or neither"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 0.0}}, "rope_theta or factor is 0"),
        (LLAMA | {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is 'inf'"),
        (
            LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "has 'full_attention': {'rope_type': 'y",
        ),
        (LLAMA | {"rope_scaling": {"mrope_section": [1, 1, 2]}}, "has 'mrope_section'"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 2.0}, "rope_scaling": {"rope_theta": 3.0}},
            "are both given, and differ",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
            "llama3, and original_max_position",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            "original_max_position_embeddings is '16'",
        ),
        (LLAMA | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
        (
            LLAMA | {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2, "sliding_window": None},
            "layer_types has 'sliding_attention', and only full_attention",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is '0.5'"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "weights are quantized"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps is '1000"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000', not a whole number from 1 to 10000"),
        (LLAMA | {"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is 'None'"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is 'True'"),
        (GPT2 | {"activation_function": "swish"}, "activation_function is 'swish', not of gelu_new"),
        (GPT2 | {"n_head": 5}, "n_head=5 does not divide n_embd=32"),
    ],
)
def test_what_would_be_another_model_is_refused(content, match):
    with pytest.raises(CheckpointError, match=match):
        huggingface.describe(content, "config.json")


def test_a_window_shortens_what_the_model_can_place():
    described = huggingface.describe(LLAMA | {"model_type": "mistral", "sliding_window": 16}, "x")
    assert described.model.max_position_embeddings == described.window == 16
    assert "max_position_embeddings is 16 instead of 64" in described.notes[0]
    whole = huggingface.describe(LLAMA | {"model_type": "mistral", "sliding_window": None}, "x")
    assert whole.model.max_position_embeddings == 64 and whole.window is None and not whole.notes
    silent = huggingface.describe(LLAMA | {"model_type": "mistral", "max_position_embeddings": 8192}, "x")
    assert silent.window == 4096
    idle = huggingface.describe(LLAMA | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, "x")
    assert idle.window is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm_position": "post"}, "norm_position is post, not pre"),
        ({"rotary_percent": 0.5}, "for llama, rotary_percent is 0.5, not 1.0"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "has the form of none of gpt2"),
    ],
)
def test_a_model_of_no_family_is_told_what_fits_none(changes, match):
    model = dataclasses.replace(huggingface.describe(LLAMA, "x").model, **changes)
    with pytest.raises(CheckpointError, match=match):
        huggingface.family_of(model)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.model").touch()
    return tmp_path


def test_a_run_takes_shape_and_tokenizer_from_the_folder(folder):
    config, _ = cli.load(
        ["--load_hf", str(folder), "--train-iters", "5", "--hidden-dropout", "0.2", "--num-layers", "2"]
    )
    assert (
        config.model.num_query_groups == 2 and config.model.norm_epsilon == 1e-6 and config.model.hidden_dropout == 0.2
    )
    assert config.data.tokenizer_type == "SentencePieceTokenizer" and config.data.seq_length == 64
    assert config.checkpoint.load_hf == str(folder)
    (folder / "run.yaml").write_text(sources.dump(config))
    again, _ = cli.load(["--config", str(folder / "run.yaml")])
    assert again == config


def test_a_contradiction_names_both_sides(folder):
    (folder / "run.yaml").write_text(f"checkpoint:\n  load_hf: {folder}\nmodel:\n  num_layers: 3\n")
    with pytest.raises(ConfigError) as raised:
        cli.load(["--config", str(folder / "run.yaml"), "--rotary-base", "77", "--vocab-size", "9"])
    text = str(raised.value)
    assert f"num_layers=3 contradicts {folder / 'config.json'}, by which num_layers is 2" in text
    assert "rotary_base=77.0 contradicts" in text and "vocab_size=9 is below the 100" in text
    config, _ = cli.load(["--load-hf", str(folder), "--vocab-size", "120"])
    assert config.model.vocab_size == 120


def test_a_window_is_not_trained_beyond(folder):
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mistral", "sliding_window": 16}))
    with pytest.raises(ConfigError, match="max_position_embeddings=64 is beyond the window of 16 tokens"):
        cli.load(["--load-hf", str(folder), "--max-position-embeddings", "64"])


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"[" * 10**6, "is not JSON"),
        ("config.json", b"\xff", "is not JSON"),
    ],
)
def test_a_file_that_is_no_json_is_named(folder, name, raw, match):
    (folder / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=match):
        huggingface.read_config(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("else") / "config.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        huggingface.read_config(folder)
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link out of its folder"):
        huggingface.tokenizer_fields(folder)


def test_no_torch_is_needed(folder):
    load = f"import sys; from megatron_lite.config import cli; cli.load(['--load-hf', {str(folder)!r}])"
    subprocess.run([sys.executable, "-c", f"{load}; assert 'torch' not in sys.modules"], check=True)
