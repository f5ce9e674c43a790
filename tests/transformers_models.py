"""Tiny random models of Hugging Face `transformers`, and their weights under our serial names.

The mapping is linear, so it takes gradients as well as weights.
"""

from __future__ import annotations

import torch

from megatron_lite.config.model import ModelConfig

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")


def gpt2(vocab_size: int, seq_length: int, **sizes):
    """(model, our config) of a GPT-2; `sizes` are our field names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = ModelConfig(
        num_layers=sizes.get("num_layers", 2),
        hidden_size=sizes.get("hidden_size", 32),
        num_attention_heads=sizes.get("num_attention_heads", 4),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        make_vocab_size_divisible_by=8,
    )
    theirs = GPT2Config(
        vocab_size=vocab_size,
        n_positions=seq_length,
        n_embd=ours.hidden_size,
        n_layer=ours.num_layers,
        n_head=ours.num_attention_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(theirs), ours


def llama(vocab_size: int, seq_length: int, *, kv_heads: int, **sizes):
    """(model, our config) of a LLaMA; `sizes` are our field names."""
    return _of_llamas_kind("llama", vocab_size, seq_length, kv_heads=kv_heads, **sizes)


LLAMA_3 = {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "rope_scaling_original_length": 16}
"""Stretched as Llama 3.1, after texts so short that it shows in a test's."""


def llama3(vocab_size: int, seq_length: int, **sizes):
    """(model, our config) of a LLaMA whose rotary frequencies are stretched, embeddings tied."""
    tied = {"untie_embeddings_and_output_weights": False, "rotary_base": 5e5}
    return _of_llamas_kind("llama", vocab_size, seq_length, kv_heads=2, **LLAMA_3, **tied, **sizes)


def mistral(vocab_size: int, seq_length: int, **sizes):
    """(model, our config) of a Mistral whose window is as long as its texts, and whose heads are wide."""
    window = {"sliding_window": seq_length}
    return _of_llamas_kind("mistral", vocab_size, seq_length, kv_heads=2, theirs=window, kv_channels=12, **sizes)


def qwen2(vocab_size: int, seq_length: int, **sizes):
    """(model, our config) of a Qwen2: biases on query, key and value alone, embeddings tied."""
    tied = {"untie_embeddings_and_output_weights": False}
    return _of_llamas_kind("qwen2", vocab_size, seq_length, kv_heads=2, add_qkv_bias=True, **tied, **sizes)


def qwen3(vocab_size: int, seq_length: int, **sizes):
    """(model, our config) of a Qwen3: normed queries and keys, heads wider than their share."""
    wide = {"kv_channels": 16, "rotary_base": 1e6}
    return _of_llamas_kind("qwen3", vocab_size, seq_length, kv_heads=2, qk_layernorm=True, **wide, **sizes)


def _of_llamas_kind(family, vocab_size, seq_length, *, kv_heads, theirs=None, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = ModelConfig(
        num_layers=sizes.get("num_layers", 2),
        hidden_size=sizes.get("hidden_size", 32),
        num_attention_heads=sizes.get("num_attention_heads", 4),
        num_query_groups=kv_heads,
        ffn_hidden_size=sizes.get("ffn_hidden_size", 48),
        normalization="RMSNorm",
        norm_epsilon=1e-6,
        position_embedding_type="rope",
        swiglu=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        make_vocab_size_divisible_by=8,
        **{"untie_embeddings_and_output_weights": True}
        | {key: value for key, value in sizes.items() if key not in _SIZES},
    )
    rope = {"rope_type": "default", "rope_theta": ours.rotary_base}
    if ours.use_rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": ours.rope_scaling_factor,
            "low_freq_factor": ours.rope_scaling_low_freq_factor,
            "high_freq_factor": ours.rope_scaling_high_freq_factor,
            "original_max_position_embeddings": ours.rope_scaling_original_length,
        }
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        max_position_embeddings=seq_length,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.ffn_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=ours.norm_epsilon,
        rope_parameters=rope,
        head_dim=ours.head_dim,
        tie_word_embeddings=not ours.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **theirs or {},
    )
    return AutoModelForCausalLM.from_config(config), ours


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every weight off its initial value, so that biases and norms take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def serial(model: torch.nn.Module, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights, or gradients, as global tensors by our serial names."""
    tensors = {name: (p.grad if gradients else p.detach()) for name, p in model.named_parameters()}
    return _from_gpt2(tensors) if "transformer.wte.weight" in tensors else _from_llama(tensors)


def _from_gpt2(tensors):
    result = {
        "embedding.word.weight": tensors["transformer.wte.weight"],
        "embedding.position.weight": tensors["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        result[f"final_norm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
    for layer in _layers(tensors, "transformer.h."):
        there, here = f"transformer.h.{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            # Conv1D keeps its weight as [input, output].
            joined = _transposed(tensors[f"{there}.attn.c_attn.{kind}"])
            width = joined.shape[0] // 3
            result[f"{here}.attention.query.{kind}"] = joined[:width]
            result[f"{here}.attention.key_value.{kind}"] = joined[width:]
            result[f"{here}.attention.output.{kind}"] = _transposed(tensors[f"{there}.attn.c_proj.{kind}"])
            result[f"{here}.mlp.up.{kind}"] = _transposed(tensors[f"{there}.mlp.c_fc.{kind}"])
            result[f"{here}.mlp.down.{kind}"] = _transposed(tensors[f"{there}.mlp.c_proj.{kind}"])
            result[f"{here}.attention_norm.{kind}"] = tensors[f"{there}.ln_1.{kind}"]
            result[f"{here}.mlp_norm.{kind}"] = tensors[f"{there}.ln_2.{kind}"]
    return result


def _transposed(tensor):
    return tensor.mT.contiguous() if tensor.dim() == 2 else tensor


def _from_llama(tensors):
    result = {
        "embedding.word.weight": tensors["model.embed_tokens.weight"],
        "final_norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        result["head.weight"] = tensors["lm_head.weight"]
    for layer in _layers(tensors, "model.layers."):
        there, here = f"model.layers.{layer}", f"layers.{layer}"
        attention, mlp = f"{there}.self_attn", f"{there}.mlp"
        gate_up = (tensors[f"{mlp}.gate_proj.weight"], tensors[f"{mlp}.up_proj.weight"])
        for kind in ("weight", "bias") if f"{attention}.q_proj.bias" in tensors else ("weight",):
            keys_values = (tensors[f"{attention}.k_proj.{kind}"], tensors[f"{attention}.v_proj.{kind}"])
            result[f"{here}.attention.query.{kind}"] = tensors[f"{attention}.q_proj.{kind}"]
            result[f"{here}.attention.key_value.{kind}"] = torch.cat(keys_values)
        if f"{attention}.q_norm.weight" in tensors:
            result[f"{here}.attention.query_norm.weight"] = tensors[f"{attention}.q_norm.weight"]
            result[f"{here}.attention.key_norm.weight"] = tensors[f"{attention}.k_norm.weight"]
        result[f"{here}.attention.output.weight"] = tensors[f"{attention}.o_proj.weight"]
        result[f"{here}.mlp.gate_up.weight"] = torch.cat(gate_up)
        result[f"{here}.mlp.down.weight"] = tensors[f"{mlp}.down_proj.weight"]
        result[f"{here}.attention_norm.weight"] = tensors[f"{there}.input_layernorm.weight"]
        result[f"{here}.mlp_norm.weight"] = tensors[f"{there}.post_attention_layernorm.weight"]
    return result


def _layers(tensors, prefix):
    return sorted({int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)})


def load_serial(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put global tensors into this rank's parameters of a GPT; every name must match."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parameter.mesh_layout.cut(tensors[name]))
