"""The memory of one rank in closed form: state by ZeRO stage, activations by recompute, and the peak.

The stages as DeepSpeed 0.19 keeps them (Rajbhandari et al. 2020), with p elements on this tensor rank,
d data ranks, w bytes a weight, n optimizer slots of fp32 (of 8-bit codes: see optimizer.py):

    stage   weights   masters   slots     gradients
    0       4 p       -         4 n p     4 p                     fp32 alone: weights are their own masters
    1       w p       4 p/d     4 n p/d   4 p                     fp32, kept; in fp32 no masters either
    2       w p       4 p/d     4 n p/d   4 p/d (twice while micro-batches add up)
    3       w p/d     4 p/d     4 n p/d   4 p/d, and a bucket; weights are gathered in forward and backward

In stages 2 and 3 reduction goes through a bucket of `reduce_bucket_size` elements, and the step flattens
this rank's gradients into another fp32 copy; in stage 1 both work on the gradients where they are. A peak is looked for at several moments, and the moment that has it is told.
Offloading is not planned: it moves masters, slots or weights to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lite.config.run import RunConfig
from megatron_lite.plan.activations import FP32, Activations, element_bytes, plan_activations
from megatron_lite.plan.optimizer import is_coded, slot_bytes
from megatron_lite.plan.parameters import ParameterShape, padded_vocab_size, parameter_shapes

GRANULARITIES = ("none", "selective", "full")
REPLICA_BUCKET_BYTES = 64 * 2**20
"""Flat buffer through which gradients are summed without ZeRO."""
GATHERED_PARAMETERS = 10**9
"""Elements stage 3 keeps gathered at most (DeepSpeed's `stage3_max_live_parameters`)."""
CUDA_WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS takes from torch's allocator, on Hopper."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, in bytes; the parts add up to `total`."""

    name: str
    weights: int
    optimizer: int
    gradients: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations + self.temporary


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes a rank holds whatever the micro-batch."""

    weights: int
    optimizer: int
    """fp32 masters and optimizer slots."""
    gradients: int
    """At their largest, between backward and step."""


def checkpoint_bytes(config: RunConfig, elements: int, coded: int) -> int:
    """A checkpoint's size: fp32 masters and slots of every parameter, once; `coded` of them have 8-bit slots."""
    slots = 0 if config.checkpoint.no_save_optim else slot_bytes(config.optimizer, elements, coded)
    return FP32 * elements + slots


def micro_batches(config: RunConfig, data_size: int) -> int:
    """Micro-batches of one step on each data rank, at the full batch size."""
    return max(1, config.training.batch_size(data_size) // (config.training.micro_batch_size * data_size))


def plan_state(config: RunConfig, elements: int, coded: int, data_size: int) -> State:
    """State of a rank that holds `elements` parameters of its tensor group, `coded` of them with 8-bit slots."""
    stage, width = config.effective_zero_stage, element_bytes(config.precision)
    part = -(-elements // data_size)
    if stage == 0:
        return State(FP32 * elements, slot_bytes(config.optimizer, elements, coded), FP32 * elements)
    weights = width * (part if stage == 3 else elements)
    gradients = FP32 * (elements if stage == 1 else part)
    masters = 0 if stage == 1 and width == FP32 else FP32 * part
    return State(weights, masters + slot_bytes(config.optimizer, part, coded * part // elements), gradients)


def moments(
    config: RunConfig,
    *,
    data_size: int,
    vocab_size: int,
    device_type: str = "cpu",
    granularity: str | None = None,
    reduce_bucket_size: int = 500_000_000,
) -> list[Moment]:
    """The moments of a step at which memory can be highest.

    `reduce_bucket_size` is DeepSpeed's, in elements. On a CPU a page of it counts once it is written.
    """
    stage, width = config.effective_zero_stage, element_bytes(config.precision)
    tensor = config.parallel.tensor_model_parallel_size
    shapes = list(
        parameter_shapes(config.model, vocab_size=vocab_size, seq_length=config.data.seq_length, tensor_size=tensor)
    )
    elements = sum(shape.local_elements for shape in shapes)
    part = -(-elements // data_size)
    coded = sum(shape.local_elements for shape in shapes if is_coded(config.optimizer, shape))
    state = plan_state(config, elements, coded, data_size)
    activations = plan_activations(config, vocab_size=vocab_size, device_type=device_type, granularity=granularity)
    workspace = CUDA_WORKSPACE_BYTES if device_type == "cuda" else 0
    touched = reduce_bucket_size if device_type == "cuda" else min(reduce_bucket_size, elements)
    bucket = width * touched
    accumulates = micro_batches(config, data_size) > 1

    if stage == 3:
        workspace += bucket + width * min(elements, GATHERED_PARAMETERS)
    found = []
    for name, alive, temporary, share in _backward(config, activations, shapes, width, vocab_size, tensor):
        if stage == 0:
            gradients = state.gradients if accumulates else int(state.gradients * share)
        elif stage == 1:
            gradients = state.gradients
        elif stage == 2:
            # The sum so far, this micro-batch's part, and the bucket, which fills as backward goes on.
            if width == FP32:
                parts = accumulates + (share > 0)
            else:
                parts = 1 + share
            gradients = int(state.gradients * parts + bucket * share)
        else:
            gradients = state.gradients
        found.append(Moment(name, state.weights, state.optimizer, gradients, alive, temporary + workspace))

    if stage == 0:
        sum_up = min(REPLICA_BUCKET_BYTES, state.gradients) if data_size > 1 else 0
        found.append(Moment("summing gradients", state.weights, state.optimizer, state.gradients, 0, sum_up))
        return found
    flat = FP32 * part
    if stage == 1:
        # nccl reduces in place; between CPUs a part of another rank's comes in beside.
        received = flat if data_size > 1 and device_type == "cpu" else 0
        found.append(
            Moment("reducing gradients", state.weights, state.optimizer, state.gradients, 0, received + workspace)
        )
        step = (state.gradients, 0)
    elif stage == 2:
        step = (state.gradients, flat if width == FP32 else 0)
    else:
        step = (state.gradients, flat + bucket)
    found.append(Moment("optimizer step", state.weights, state.optimizer, step[0], 0, step[1]))
    return found


def peak(config: RunConfig, **arguments) -> Moment:
    """The moment of `moments` with the largest total."""
    return max(moments(config, **arguments), key=lambda moment: moment.total)


def _backward(
    config: RunConfig,
    activations: Activations,
    shapes: list[ParameterShape],
    width: int,
    vocab_size: int,
    tensor: int,
) -> Iterator[tuple[str, int, int, float]]:
    """(name, bytes alive, temporary bytes, share of all weight gradients made) of the moments of backward."""
    model = config.model
    rows = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tensor) // tensor
    vocabulary = rows * model.hidden_size
    elements = sum(shape.local_elements for shape in shapes)
    per_layer = sum(shape.local_elements for shape in shapes if shape.name.startswith("layers.0."))
    alive = activations.kept
    # A weight's gradient is made in the weight's dtype before it is added to the sum.
    yield "backward of the output layer", alive, activations.head_temporary + width * vocabulary, 0.0
    alive -= activations.head
    made = vocabulary
    last = model.num_layers
    for size, again in zip(reversed(activations.group_sizes), reversed(activations.recomputed), strict=True):
        yield "backward of the layers", alive + again, activations.layer_temporary, made / elements
        alive -= sum(activations.layers[last - size : last])
        made += size * per_layer
        last -= size
    yield "backward of the embedding", alive, width * vocabulary, min(1.0, made / elements)
