"""The parameters of Hugging Face's models, and which of ours they are. No torch in what is said here but shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from megatron_lite.checkpoint.foreign import Link, rows, whole
from megatron_lite.config.model import ModelConfig

_IDLE = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""Constants that older versions stored beside the weights."""


HEAD = "lm_head.weight"


def is_idle(name: str, *, tied: bool) -> bool:
    """Whether a stored tensor is no weight: a constant, or what is said to be a second copy of the embedding."""
    return bool(_IDLE.fullmatch(name)) or (tied and name == HEAD)


def links(
    model: ModelConfig, family: str, *, vocab_size: int, positions: int, stored: Collection[str] = ()
) -> list[Link]:
    """All parameters of a model as its family names them, with the prefix that `stored` names have."""
    if family == "gpt2":
        prefix = "" if "wte.weight" in stored else "transformer."
        found = list(_gpt2(model, prefix, vocab_size, positions))
    else:
        prefix = "" if "embed_tokens.weight" in stored else "model."
        found = list(_llama_kind(model, prefix, vocab_size))
    if model.untie_embeddings_and_output_weights:
        found.append(whole("head.weight", HEAD, vocab_size, model.hidden_size))
    return found


def _gpt2(model: ModelConfig, prefix: str, vocab_size: int, positions: int) -> Iterator[Link]:
    hidden, inner = model.hidden_size, model.ffn_size
    yield whole("embedding.word.weight", f"{prefix}wte.weight", vocab_size, hidden)
    yield whole("embedding.position.weight", f"{prefix}wpe.weight", positions, hidden)
    for kind in ("weight", "bias"):
        width = (hidden,) if kind == "weight" else ()
        for i in range(model.num_layers):
            ours, theirs = f"layers.{i}", f"{prefix}h.{i}"
            # Conv1D keeps its weight as [input, output].
            options = {"transposed": True}
            yield whole(f"{ours}.attention_norm.{kind}", f"{theirs}.ln_1.{kind}", hidden)
            joined = f"{theirs}.attn.c_attn.{kind}"
            yield rows(f"{ours}.attention.query.{kind}", 0, joined, 0, hidden, *width, **options)
            yield rows(f"{ours}.attention.key_value.{kind}", 0, joined, hidden, 2 * hidden, *width, **options)
            yield whole(f"{ours}.attention.output.{kind}", f"{theirs}.attn.c_proj.{kind}", hidden, *width, **options)
            yield whole(f"{ours}.mlp_norm.{kind}", f"{theirs}.ln_2.{kind}", hidden)
            yield whole(f"{ours}.mlp.up.{kind}", f"{theirs}.mlp.c_fc.{kind}", inner, *width, **options)
            inward = (inner,) if kind == "weight" else ()
            yield whole(f"{ours}.mlp.down.{kind}", f"{theirs}.mlp.c_proj.{kind}", hidden, *inward, **options)
        yield whole(f"final_norm.{kind}", f"{prefix}ln_f.{kind}", hidden)


def _llama_kind(model: ModelConfig, prefix: str, vocab_size: int) -> Iterator[Link]:
    hidden, inner = model.hidden_size, model.ffn_size
    query, group = model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
    yield whole("embedding.word.weight", f"{prefix}embed_tokens.weight", vocab_size, hidden)
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}layers.{i}"
        yield whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden)
        yield whole(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden)
        if model.qk_layernorm:
            yield whole(f"{ours}.attention.query_norm.weight", f"{theirs}.self_attn.q_norm.weight", model.head_dim)
            yield whole(f"{ours}.attention.key_norm.weight", f"{theirs}.self_attn.k_norm.weight", model.head_dim)
        for kind in ("weight", "bias"):
            into = {"input": (hidden,), "heads": (query,), "inner": (inner,)} if kind == "weight" else {}
            width = into.get("input", ())
            attention, there = f"{ours}.attention", f"{theirs}.self_attn"
            if kind == "weight" or model.has_qkv_bias:
                yield whole(f"{attention}.query.{kind}", f"{there}.q_proj.{kind}", query, *width)
                yield rows(f"{attention}.key_value.{kind}", 0, f"{there}.k_proj.{kind}", 0, group, *width)
                yield rows(f"{attention}.key_value.{kind}", group, f"{there}.v_proj.{kind}", 0, group, *width)
            if kind == "weight" or model.add_bias_linear:
                mlp = f"{theirs}.mlp"
                yield whole(f"{attention}.output.{kind}", f"{there}.o_proj.{kind}", hidden, *into.get("heads", ()))
                yield rows(f"{ours}.mlp.gate_up.{kind}", 0, f"{mlp}.gate_proj.{kind}", 0, inner, *width)
                yield rows(f"{ours}.mlp.gate_up.{kind}", inner, f"{mlp}.up_proj.{kind}", 0, inner, *width)
                yield whole(f"{ours}.mlp.down.{kind}", f"{mlp}.down_proj.{kind}", hidden, *into.get("inner", ()))
    yield whole("final_norm.weight", f"{prefix}norm.weight", hidden)
