"""What one micro-batch keeps for backward on one rank, in closed form, for this model's layers.

After Korthikanti et al. 2022, with what this code saves: a norm keeps its input, or its output, linear layers
that read the same tensor keep it once, dropout and its bias nothing, `scaled_dot_product_attention` keeps query,
key, value, output and a log-sum-exp instead of the square that the softmax kernel keeps, and the cross-entropy
keeps the logits, or, made of a chunk of them at a time, none. A test holds the formulas to what torch's allocator
counts.
"""

from __future__ import annotations

import dataclasses

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.parallel.pipeline.partition import Stage, whole_model
from megatron_lite.plan.parameters import padded_vocab_size

FP32 = 4
TOKEN_ID = 8
LOSS_BYTES_PER_TOKEN = 28
"""Label, four statistics and a factor that the cross-entropy keeps of each token, beside the logits."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    embedding: int
    layers: tuple[int, ...]
    """Kept of each layer from forward to backward."""
    recomputed: tuple[int, ...]
    """What backward of each group of layers makes again, at once; one entry a group."""
    group_sizes: tuple[int, ...]
    """Layers in each group that backward walks as one; 1 without full recompute."""
    head: int
    """Final norm, input of the output layer, logits and loss."""
    layer_temporary: int
    """Most that backward of a layer needs beside what it frees."""
    head_temporary: int
    """Most that backward of the output layer needs for a moment, weight gradient apart."""

    @property
    def kept(self) -> int:
        """All that is alive between forward and backward."""
        return self.embedding + sum(self.layers) + self.head


def element_bytes(precision: PrecisionConfig) -> int:
    """Bytes of a weight or activation element."""
    return 4 if precision.dtype == "fp32" else 2


def plan_activations(
    config: RunConfig,
    *,
    vocab_size: int,
    device_type: str = "cpu",
    granularity: str | None = None,
    stage: Stage | None = None,
) -> Activations:
    """What a micro-batch of `config` keeps in a stage (default: the whole model); `granularity` stands in for the
    configured recompute."""
    stage = stage or whole_model(config.model.num_layers)[0]
    model, training = config.model, config.training
    tensor = config.parallel.tensor_model_parallel_size
    element = element_bytes(config.precision)
    tokens = training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size
    whole = tokens * model.hidden_size * element
    residual = whole // tensor if config.parallel.sequence_parallel else whole
    norm, input_kept = _norm(config, element, residual, device_type)
    granularity = granularity or training.recompute_granularity

    projected, core, core_temporary = _attention(config, element, device_type)
    feed_forward, feed_forward_temporary = _feed_forward(model, tokens, element, tensor)
    first_half = norm + whole + projected
    second_half = norm + whole + feed_forward
    if granularity == "selective":
        # The core is made again once the second half is gone.
        plain, again = first_half + second_half, max(0, core + core_temporary - second_half)
    else:
        plain, again = first_half + core + second_half, 0
    layers, recomputed, sizes = _by_recompute(
        len(stage.layers), plain, residual, training, granularity, again, input_kept
    )

    rows = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tensor) // tensor
    logits, head_temporary = tokens * rows * element, whole
    if 0 < config.kernels.loss_chunk_size < rows:
        # Backward has a chunk's logits, the sum of the chunks' hidden gradients in fp32, and one of them.
        logits = 0
        chunk = tokens * config.kernels.loss_chunk_size * element
        head_temporary = chunk + tokens * model.hidden_size * FP32 + whole
    head = (norm if model.norm_position == "pre" else 0) + whole + logits + tokens * LOSS_BYTES_PER_TOKEN
    return Activations(
        embedding=tokens * TOKEN_ID if stage.is_first else 0,
        layers=layers,
        recomputed=recomputed,
        group_sizes=sizes,
        head=head if stage.is_last else 0,
        layer_temporary=whole + max(feed_forward_temporary, core_temporary - second_half),
        head_temporary=head_temporary,
    )


def _norm(config: RunConfig, element: int, residual: int, device_type: str) -> tuple[int, int]:
    """Bytes a norm keeps, and those of them that are a layer's input, its first norm's."""
    model, kernels = config.model, config.kernels
    tokens = residual // (model.hidden_size * element)
    by_torch = kernels.norm_backend == "torch"
    statistics = tokens * (1 if model.normalization == "RMSNorm" else 2) * FP32
    if by_torch and device_type == "cpu":
        if model.normalization == "LayerNorm":
            return residual + 2 * tokens * element, residual
        # Torch's RMS norm for a CPU is a chain: input and normalised input are kept in fp32.
        return 2 * tokens * model.hidden_size * FP32 + statistics, residual if element == FP32 else 0
    if not kernels.memory_efficient_layer_norm or by_torch:
        return residual + statistics, residual
    # The output is what the linear layers keep, unless they keep it gathered from the tensor ranks.
    gathered = config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size > 1
    return statistics + (residual if gathered else 0), residual if model.norm_position == "post" else 0


def _attention(config: RunConfig, element: int, device_type: str) -> tuple[int, int, int]:
    """Bytes of the core's inputs and output, what the core keeps beside them, and what its backward needs."""
    model, batch, seq_length = config.model, config.training.micro_batch_size, config.data.seq_length
    tensor = config.parallel.tensor_model_parallel_size
    context = config.parallel.context_parallel_size
    tokens = batch * seq_length // context
    heads = model.num_attention_heads // tensor
    query = tokens * heads * model.head_dim
    keys = tokens * max(1, model.kv_heads // tensor) * model.head_dim
    square = tokens * heads * seq_length
    backend, dropout = config.kernels.attention_backend, bool(model.attention_dropout)
    fused_softmax = backend == "fused_softmax" or (backend == "auto" and dropout and device_type == "cpu")
    inputs = query + 2 * keys
    copies_projection = context > 1 or (fused_softmax and batch > 1)
    normed = 0
    if model.qk_layernorm:
        normed = _head_norms(config, element, device_type, tokens, query, keys, copies_projection)
    if context > 1 and config.parallel.cp_comm_type == "p2p":
        # Keys and values are copied side by side. Their gradients, and those of queries, are summed in fp32, and a
        # pair and its gradients come in while others go out.
        kept = (inputs + query) * element + tokens * heads * FP32 + normed
        summed = query * FP32 + 2 * keys * (2 * FP32 + element)
        if backend == "fused_softmax":
            return kept + query * element, 0, summed + 3 * tokens * heads * (seq_length // context) * FP32
        return kept, 0, summed
    if context > 1:
        # Whole sequences of some heads are copies, and the output is one again; key/value heads fewer than ranks are
        # repeated.
        keys = max(keys, tokens * context * model.head_dim)
        inputs = (1 if fused_softmax else 2) * query + 2 * keys
    elif (model.position_embedding_type == "rope" or model.qk_layernorm) and not copies_projection:
        # Rotated or normed keys are a copy, while the values still hold the whole key/value projection. A product
        # over several sequences takes its own copy of them.
        inputs += keys
    kept = (inputs + query) * element + normed
    if fused_softmax:
        if dropout:
            return kept, 2 * square * element, square * element
        return kept, square * element, 2 * square * element
    if device_type == "cpu" and dropout:
        # torch's CPU kernel has no dropout: probabilities, noise and their product are kept, all in fp32.
        return kept, 3 * square * FP32 + (query + 2 * keys) * (FP32 - element), square * FP32
    return kept, tokens * heads * FP32, 0


def _head_norms(
    config: RunConfig, element: int, device_type: str, tokens: int, query: int, keys: int, copies_projection: bool
) -> int:
    """Bytes the norms of queries and keys keep beside what attention does."""
    model, kernels = config.model, config.kernels
    heads = (query + keys) // model.head_dim
    statistics = heads * (1 if model.normalization == "RMSNorm" else 2) * FP32
    by_torch = kernels.norm_backend == "torch"
    if by_torch and device_type == "cpu" and model.normalization == "RMSNorm":
        return 2 * (query + keys) * FP32 + statistics
    if kernels.memory_efficient_layer_norm and not by_torch:
        # The outputs: what attention reads, unless it is rotated first.
        return (query + keys) * element * (model.position_embedding_type == "rope") + statistics
    # Queries, and the whole key/value projection, which the values hold anyway where they are no copy.
    return (query + 2 * keys * copies_projection) * element + statistics


def _feed_forward(model: ModelConfig, tokens: int, element: int, tensor: int) -> tuple[int, int]:
    """Bytes kept, and bytes its backward needs beside what it frees."""
    inner = tokens * (model.ffn_size // tensor) * element
    if model.swiglu:
        return 3 * inner, 2 * inner
    return (inner if model.activation_func == "relu" else 2 * inner), inner


def _by_recompute(
    num_layers: int, plain: int, residual: int, training: TrainingConfig, granularity: str, again: int, input_kept: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(kept of each layer, made again by each group, layers of each group); `input_kept` of `plain` is the input."""
    length = max(1, min(training.recompute_num_layers, num_layers))
    if granularity != "full":
        return (plain,) * num_layers, (again,) * num_layers, (1,) * num_layers
    if training.recompute_method == "block":
        kept = (residual,) * length + (plain,) * (num_layers - length)
        made_again = (plain - input_kept,) * length + (0,) * (num_layers - length)
        return kept, made_again, (1,) * num_layers
    sizes = tuple(min(length, num_layers - first) for first in range(0, num_layers, length))
    kept = tuple(residual if i % length == 0 else 0 for i in range(num_layers))
    return kept, tuple(size * plain - input_kept for size in sizes), sizes
