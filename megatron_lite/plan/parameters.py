"""The parameters of a model in closed form: names, shapes and numbers, whole and on one rank.

The model lays its parameters out itself; a test holds the two equal, name by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_lite.config.model import ModelConfig

COMPONENTS = ("word embedding", "position embedding", "attention", "feed-forward", "norms", "output head")


@dataclasses.dataclass(frozen=True)
class ParameterShape:
    """One parameter: its serial name, what it is part of, its shape, and its shape on a tensor rank."""

    name: str
    component: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    is_vector: bool
    """A bias or norm weight, which has an optimizer group of its own."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def local_elements(self) -> int:
        return math.prod(self.local_shape)


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    """All, at the true vocabulary."""
    trainable: int
    without_embedding: int
    """Layers and final norm alone: neither embeddings nor an untied output head."""
    by_component: dict[str, int]
    """`COMPONENTS` that have any."""
    on_rank: int
    """Elements one tensor rank holds, padding of the vocabulary and replicas included."""


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_size: int) -> int:
    """Rows of the word embedding in memory, over all tensor ranks."""
    unit = divisible_by * tensor_size
    return -(-vocab_size // unit) * unit


def parameter_shapes(
    config: ModelConfig, *, vocab_size: int, seq_length: int, tensor_size: int = 1
) -> Iterator[ParameterShape]:
    """The parameters of a model in the order of its forward pass, as every tensor rank holds them.

    `seq_length` is the length of learned positions where `max_position_embeddings` is not given.
    """

    def parameter(name: str, component: str, *shape: int, split: int | None = None, local: int | None = None):
        held = list(shape)
        if split is not None:
            held[split] = shape[split] // tensor_size if local is None else local
        vector = name.endswith("bias") or component == "norms"
        return ParameterShape(name, component, shape, tuple(held), vector)

    def norm(name: str, width: int = config.hidden_size):
        yield parameter(f"{name}.weight", "norms", width)
        if config.normalization == "LayerNorm":
            yield parameter(f"{name}.bias", "norms", width)

    hidden, ffn = config.hidden_size, config.ffn_size
    query, key_value = config.num_attention_heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    # Key/value heads fewer than tensor ranks are held by several of them.
    local_key_value = 2 * max(1, config.kv_heads // tensor_size) * config.head_dim
    local_vocab = padded_vocab_size(vocab_size, config.make_vocab_size_divisible_by, tensor_size) // tensor_size
    up, up_width = ("gate_up", 2 * ffn) if config.swiglu else ("up", ffn)

    yield parameter("embedding.word.weight", "word embedding", vocab_size, hidden, split=0, local=local_vocab)
    if config.position_embedding_type == "learned_absolute":
        length = config.max_position_embeddings or seq_length
        yield parameter("embedding.position.weight", "position embedding", length, hidden)
    for i in range(config.num_layers):
        attention, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        yield from norm(f"layers.{i}.attention_norm")
        yield parameter(f"{attention}.query.weight", "attention", query, hidden, split=0)
        if config.has_qkv_bias:
            yield parameter(f"{attention}.query.bias", "attention", query, split=0)
        yield parameter(f"{attention}.key_value.weight", "attention", key_value, hidden, split=0, local=local_key_value)
        if config.has_qkv_bias:
            yield parameter(f"{attention}.key_value.bias", "attention", key_value, split=0, local=local_key_value)
        if config.qk_layernorm:
            yield from norm(f"{attention}.query_norm", config.head_dim)
            yield from norm(f"{attention}.key_norm", config.head_dim)
        yield parameter(f"{attention}.output.weight", "attention", hidden, query, split=1)
        if config.add_bias_linear:
            yield parameter(f"{attention}.output.bias", "attention", hidden)
        yield from norm(f"layers.{i}.mlp_norm")
        yield parameter(f"{mlp}.{up}.weight", "feed-forward", up_width, hidden, split=0)
        if config.add_bias_linear:
            yield parameter(f"{mlp}.{up}.bias", "feed-forward", up_width, split=0)
        yield parameter(f"{mlp}.down.weight", "feed-forward", hidden, ffn, split=1)
        if config.add_bias_linear:
            yield parameter(f"{mlp}.down.bias", "feed-forward", hidden)
    if config.norm_position == "pre":
        yield from norm("final_norm")
    if config.untie_embeddings_and_output_weights:
        yield parameter("head.weight", "output head", vocab_size, hidden, split=0, local=local_vocab)


def count_parameters(config: ModelConfig, *, vocab_size: int, seq_length: int, tensor_size: int = 1) -> ParameterCount:
    """How many parameters a model has."""
    by_component = dict.fromkeys(COMPONENTS, 0)
    on_rank = 0
    for shape in parameter_shapes(config, vocab_size=vocab_size, seq_length=seq_length, tensor_size=tensor_size):
        by_component[shape.component] += shape.elements
        on_rank += shape.local_elements
    total = sum(by_component.values())
    outside = sum(by_component[name] for name in ("word embedding", "position embedding", "output head"))
    return ParameterCount(
        total=total,
        trainable=total,
        without_embedding=total - outside,
        by_component={name: number for name, number in by_component.items() if number},
        on_rank=on_rank,
    )
