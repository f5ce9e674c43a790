"""The model: shape and choices of one GPT."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

_FREE = frozenset(
    "hidden_dropout attention_dropout init_method init_method_std label_smoothing z_loss "
    "vocab_size make_vocab_size_divisible_by max_position_embeddings".split()
)
"""Settings that may change under a model's weights: of training alone, and numbers of rows."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and choices of the transformer. GPT-2 and LLaMA are two settings of it."""

    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); default: num_attention_heads."""
    kv_channels: int | None = None
    """Width of one head; default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; default: 4 x hidden_size, or with --swiglu 8/3 x hidden_size
    rounded down to a multiple of 64, but at least 64."""
    max_position_embeddings: int | None = None
    """Longest sequence the model can place; default: seq_length."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside a norm."""
    norm_position: Literal["pre", "post"] = "pre"
    """Norm before each sub-layer (GPT-2, LLaMA), or after the residual addition (the first transformer)."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """Learned position vectors (GPT-2), rotary embedding (LLaMA), or none."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of each head that is rotated."""
    rotary_interleaved: bool = False
    """Rotate pairs of neighbours (GPT-J) instead of halves (LLaMA)."""
    use_rope_scaling: bool = False
    """Slow rotary frequencies down, for texts longer than those trained on before (Llama 3.1)."""
    rope_scaling_factor: float = 8.0
    """How much slower the slowest frequencies become."""
    rope_scaling_low_freq_factor: float = 1.0
    """Frequencies of fewer turns than this in the original length are slowed down in full."""
    rope_scaling_high_freq_factor: float = 4.0
    """Frequencies of more turns than this are left alone; between the two it goes over evenly."""
    rope_scaling_original_length: int = 8192
    """Tokens of the texts trained on before."""
    swiglu: bool = False
    """Gated feed-forward layer: silu(gate) x up."""
    activation_func: Literal["gelu_tanh", "gelu", "relu", "squared_relu"] = "gelu_tanh"
    """Activation of the feed-forward layer without --swiglu."""
    add_bias_linear: bool = True
    """Biases in all linear layers of the blocks."""
    add_qkv_bias: bool = False
    """Biases in query, key and value even where add_bias_linear is off (Qwen2)."""
    qk_layernorm: bool = False
    """Norms of queries and keys, head by head, before they are rotated (Qwen3)."""
    untie_embeddings_and_output_weights: bool = False
    """Output head with a weight of its own instead of the embedding's."""
    hidden_dropout: float = 0.1
    """Dropout after embedding, attention and feed-forward layer."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    init_method: Literal["normal", "xavier_uniform"] = "normal"
    """Initialisation of matrices; residual outputs of "normal" are scaled by 1/sqrt(2 num_layers) (GPT-2)."""
    init_method_std: float = 0.02
    """Standard deviation of "normal"."""
    vocab_size: int | None = None
    """Number of token ids; default: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded in memory to a multiple of this times the tensor size; never stored."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary, in training."""
    z_loss: float = 0.0
    """Weight of the squared log-partition penalty (PaLM), in training."""

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(self.hidden_size * 8 // 3 // 64, 1) * 64
        return 4 * self.hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def computation(self) -> dict[str, Any]:
        """The settings that decide what is computed from the weights: defaults filled in, idle ones left out."""
        chosen = {
            **dataclasses.asdict(self),
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_size,
            "add_qkv_bias": self.has_qkv_bias,
        }
        without_effect = set(_FREE)
        if self.position_embedding_type != "rope":
            without_effect |= {name for name in chosen if name.startswith(("rotary_", "rope_scaling_", "use_rope_"))}
        elif not self.use_rope_scaling:
            without_effect |= {name for name in chosen if name.startswith("rope_scaling_")}
        if self.swiglu:
            without_effect |= {"activation_func"}
        return {name: value for name, value in chosen.items() if name not in without_effect}
