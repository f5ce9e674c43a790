"""Model FLOPs in closed form: what a step must compute, however it is computed.

A multiply-add is 2 FLOPs, backward is twice forward. Per token and layer, forward:

    query and output projection   2 * 2 H N D
    key and value                 2 * 2 H K D        (grouped-query attention: K < N)
    scores and their use          2 * 2 S N D        (S/2 with `causal`)
    feed-forward                  2 * 2 H F          (SwiGLU: 2 * 3 H F)

and once the output head, 2 H V, V the true vocabulary. Norms, activations, softmax and the embedding
look-up are not counted, nor is what recompute does again, nor padding. Attention is counted as the full
square, the convention of PaLM (Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T) and of the MFU
figures published since, so that ours compare; `causal` counts the half that a causal kernel needs.
"""

from __future__ import annotations

from megatron_lite.config.model import ModelConfig


def forward_flops_per_token(config: ModelConfig, *, vocab_size: int, seq_length: int, causal: bool = False) -> float:
    """FLOPs of one token's forward pass over all ranks."""
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    attended = (seq_length + 1) / 2 if causal else seq_length
    projections = 2 * 2 * hidden * head_dim * (heads + config.kv_heads)
    scores = 2 * 2 * attended * heads * head_dim
    feed_forward = 2 * (3 if config.swiglu else 2) * hidden * config.ffn_size
    return config.num_layers * (projections + scores + feed_forward) + 2 * hidden * vocab_size


def flops_per_token(config: ModelConfig, *, vocab_size: int, seq_length: int, causal: bool = False) -> float:
    """FLOPs of one token's forward and backward pass over all ranks; times tokens a second it is FLOP/s."""
    return 3 * forward_flops_per_token(config, vocab_size=vocab_size, seq_length=seq_length, causal=causal)
