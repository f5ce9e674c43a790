"""The memory of one rank in closed form: state by ZeRO stage, activations by recompute, and the peak.

The stages as DeepSpeed 0.19 keeps them (Rajbhandari et al. 2020), with p elements on this tensor rank,
d data x context ranks, w bytes a weight, n optimizer slots of fp32 (of 8-bit codes: see optimizer.py):

    stage   weights   masters   slots     gradients
    0       4 p       -         4 n p     4 p                     fp32 alone: weights are their own masters
    1       w p       4 p/d     4 n p/d   4 p                     fp32, kept; in fp32 no masters either
    2       w p       4 p/d     4 n p/d   4 p/d
    3       w p/d     4 p/d     4 n p/d   4 p/d, and a bucket; weights are gathered in forward and backward

In a pipeline p is what the rank's stages hold, and gradients are 4 p in stages 2 and 3 too until the schedule ends.

In stages 2 and 3 reduction goes through a bucket of `reduce_bucket_size` elements and a flat copy of it, and
the step flattens this rank's gradients into another fp32 copy; in stage 1 both work on the gradients where they
are. Between CPUs gloo lays what it gathers out once more. A peak is looked for at several moments, and the
moment that has it is told. Offloading is not planned: it moves masters, slots or weights to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.pipeline.partition import Stage
from megatron_lite.plan.activations import FP32, Activations, element_bytes, plan_activations
from megatron_lite.plan.optimizer import is_coded, slot_bytes
from megatron_lite.plan.parameters import ParameterShape
from megatron_lite.plan.stages import chunks_in_flight, heads_in_flight, shapes_of_rank, stages_of_rank

GRANULARITIES = ("none", "selective", "full")
BUCKETS_UNDER_WAY = 2
"""Buckets of gradients that are summed at a time beside backward."""
GATHERED_PARAMETERS = 10**9
"""Elements stage 3 keeps gathered at most (DeepSpeed's `stage3_max_live_parameters`)."""
PREFETCHED_PARAMETERS = 50_000_000
"""Elements stage 3 gathers at once (DeepSpeed's `stage3_prefetch_bucket_size`)."""
LIBRARIES_BYTES = {"cpu": 14 * 2**20, "cuda": 32 * 2**20}
"""What libraries take for themselves once training runs, measured. On a CPU 10 to 25 MiB: matrices that MKL packs,
products that oneDNN compiles (in bf16), send buffers of gloo, Python's own objects. On a GPU what cuBLAS takes from
torch's allocator, on Hopper."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, in bytes; the parts add up to `total`."""

    name: str
    weights: int
    optimizer: int
    gradients: int
    activations: int
    temporary: int
    """Weight gradients in the making, buckets, gathered weights, workspace of single operations."""
    libraries: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations + self.temporary + self.libraries


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


def host_copy_bytes(config: RunConfig, vocab_size: int, data_size: int) -> int:
    """Host memory, on the rank that takes most, for the copy from which a checkpoint is saved beside training."""
    replicas = 1 if config.effective_zero_stage == 0 else data_size * config.parallel.context_parallel_size
    largest = 0
    for pipe_rank in range(config.parallel.pipeline_model_parallel_size):
        shapes = shapes_of_rank(config, vocab_size, pipe_rank)
        elements = sum(shape.local_elements for shape in shapes)
        coded = sum(shape.local_elements for shape in shapes if is_coded(config.optimizer, shape))
        part = -(-elements // replicas)
        largest = max(largest, checkpoint_bytes(config, part, coded * part // elements))
    return largest


def micro_batches(config: RunConfig, data_size: int) -> int:
    """Micro-batches of one step on each data rank, at the full batch size."""
    return max(1, config.training.batch_size(data_size) // (config.training.micro_batch_size * data_size))


def plan_state(config: RunConfig, elements: int, coded: int, replicas: int) -> State:
    """State of a rank that holds `elements` parameters of its tensor group, `coded` of them with 8-bit slots."""
    stage, width = config.effective_zero_stage, element_bytes(config.precision)
    part = -(-elements // replicas)
    if stage == 0:
        return State(FP32 * elements, slot_bytes(config.optimizer, elements, coded), FP32 * elements)
    weights = width * (part if stage == 3 else elements)
    is_whole = stage == 1 or config.parallel.pipeline_model_parallel_size > 1
    gradients = FP32 * (elements if is_whole else part)
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
    pipe_rank: int = 0,
) -> list[Moment]:
    """The moments of a step at which memory of a rank at that place of the pipeline can be highest.

    `reduce_bucket_size` is DeepSpeed's, in elements, and stands for its all-gather bucket too. On a CPU a
    page of it counts once it is written.
    """
    shapes = shapes_of_rank(config, vocab_size, pipe_rank)
    stages = stages_of_rank(config, vocab_size, pipe_rank)
    count = micro_batches(config, data_size)
    replicas = data_size * config.parallel.context_parallel_size
    elements = sum(shape.local_elements for shape in shapes)
    coded = sum(shape.local_elements for shape in shapes if is_coded(config.optimizer, shape))
    filled = min(reduce_bucket_size, elements)
    rank = _Rank(
        stage=config.effective_zero_stage,
        width=element_bytes(config.precision),
        is_cpu=device_type == "cpu",
        replicas=replicas,
        accumulates=count > 1,
        is_pipelined=config.parallel.pipeline_model_parallel_size > 1,
        elements=elements,
        filled=filled,
        bucket=filled if device_type == "cpu" else reduce_bucket_size,
        summed_at_once=config.parallel.ddp_bucket_size,
        overlaps=config.parallel.overlap_grad_reduce and config.parallel.pipeline_model_parallel_size == 1,
        state=plan_state(config, elements, coded, replicas),
    )
    options = {"vocab_size": vocab_size, "device_type": device_type, "granularity": granularity}
    of_stage = [plan_activations(config, stage=stage, **options) for stage in stages]
    held: list[_Held] = []
    for stage, activations in zip(stages, of_stage, strict=True):
        # Beside the micro-batch that is looked at, others are on their way through this rank's stages.
        others = (chunks_in_flight(config, count, pipe_rank) - 1) * max(a.kept - a.head for a in of_stage)
        if stage.is_last and config.parallel.pipeline_model_parallel_size > 1:
            others += (heads_in_flight(config, count) - 1) * activations.head
        held += rank.in_forward(activations.kept - activations.head + others)
        points = _backward(config, stage, activations, shapes, rank.width)
        held += [rank.in_backward(dataclasses.replace(point, alive=point.alive + others)) for point in points]
    return [
        Moment(
            name,
            weights=rank.state.weights,
            optimizer=rank.state.optimizer,
            gradients=gradients,
            activations=alive,
            temporary=temporary,
            libraries=LIBRARIES_BYTES[device_type],
        )
        for name, gradients, alive, temporary in [*held, *rank.after_backward()]
    ]


def peak(config: RunConfig, **arguments) -> Moment:
    """The moment of `moments` with the largest total, on whatever rank of the pipeline has it."""
    ranks = range(config.parallel.pipeline_model_parallel_size)
    every = (moment for rank in ranks for moment in moments(config, pipe_rank=rank, **arguments))
    return max(every, key=lambda moment: moment.total)


@dataclasses.dataclass(frozen=True)
class _Point:
    """A moment of backward, as the model has it: bytes alive, bytes for a moment, weight gradients made so far."""

    name: str
    alive: int
    temporary: int
    made: int


_Held = tuple[str, int, int, int]
"""Name of a moment, and bytes of gradients, activations, and what is there for a moment."""


@dataclasses.dataclass(frozen=True)
class _Rank:
    """What the engines and DeepSpeed hold around a model of `elements` parameters on this tensor rank."""

    stage: int
    width: int
    is_cpu: bool
    replicas: int
    accumulates: bool
    is_pipelined: bool
    """Gradients stay whole until the schedule has ended."""
    elements: int
    filled: int
    """Elements in a bucket when it is reduced."""
    bucket: int
    """Elements of a bucket that take memory."""
    summed_at_once: int
    """Elements of a bucket of stages 0 and 1."""
    overlaps: bool
    """Those buckets are summed beside backward."""
    state: State

    def in_forward(self, alive: int) -> Iterator[_Held]:
        if self.stage == 3 and self.replicas > 1:
            # The buffer that whole weights came in goes when the last of them has been used.
            arrived = self.width * min(self.elements, PREFETCHED_PARAMETERS)
            bucket = 0 if self.is_pipelined else self._bucket
            yield "forward of the layers", self.state.gradients, alive, bucket + self._gathered + arrived

    def in_backward(self, point: _Point) -> _Held:
        share = point.made / self.elements
        reduces = point.made >= self.filled
        gradients, temporary = self.state.gradients, point.temporary + self._summing
        if self.is_pipelined:
            return point.name, gradients, point.alive, temporary + self._gathered
        if self.stage >= 2:
            temporary += self._reduction if reduces else 0
        if self.stage == 0 and not self.accumulates:
            gradients = int(gradients * share)
        elif self.stage == 2:
            gradients = gradients if self.accumulates or reduces else 0
            temporary += int(self._bucket * share) if self.is_cpu else self._bucket
        elif self.stage == 3:
            temporary += self._bucket + int(self._gathered * (1 - share))
        return point.name, gradients, point.alive, temporary

    @property
    def _summing(self) -> int:
        """Bytes of the buckets that are summed beside backward."""
        if not self.overlaps or self.replicas == 1 or self.stage > 1:
            return 0
        under_way = (BUCKETS_UNDER_WAY + 1) * FP32 * self.summed_at_once
        if self.stage == 0:
            return min(under_way, self.state.gradients)
        # A GPU sums where gradients are; on a CPU the rank that updates them has room for what each other one sends.
        return (self.replicas - 1) * min(under_way, self.state.gradients // self.replicas) if self.is_cpu else 0

    @property
    def _bucket(self) -> int:
        """Bytes of the bucket of stages 2 and 3: in stage 2 of the weights' dtype, in stage 3 fp32."""
        return (self.width if self.stage == 2 else FP32) * self.bucket

    @property
    def _reduction(self) -> int:
        """Bytes that stages 2 and 3 need to reduce a bucket."""
        if self.stage == 2:
            # Flattened, and then in fp32.
            return self.filled * (self.width + (FP32 if self.width != FP32 else 0))
        # Laid out by ranks, and by gloo once more.
        return self.filled * FP32 * (2 if self.is_cpu else 1)

    @property
    def _gathered(self) -> int:
        """Bytes of whole weights in stage 3, which one rank alone has as they are."""
        if self.stage < 3 or self.replicas == 1:
            return 0
        return self.width * min(self.elements, GATHERED_PARAMETERS)

    def after_backward(self) -> Iterator[_Held]:
        gradients, part = self.state.gradients, FP32 * -(-self.elements // self.replicas)
        shares = self.replicas > 1
        if self.stage == 0:
            yield "summing gradients", gradients, 0, min(FP32 * self.summed_at_once, gradients) if shares else 0
            return
        if self.stage == 1:
            # nccl reduces in place; between CPUs a part of another rank's comes in beside.
            yield "reducing gradients", gradients, 0, part if shares and self.is_cpu else 0
            yield "optimizer step", gradients, 0, 0
        else:
            # A pipeline's gradients are whole until they are reduced into this rank's part; in 16 bits that part is
            # what the bucket of stage 2 becomes in fp32.
            becomes = self.stage == 2 and self.width != FP32
            beside = part if self.is_pipelined and not becomes else 0
            yield "reducing gradients", gradients, 0, beside + self._bucket + self._reduction
            gradients = part
            kept = part if self.width == FP32 else 0
            yield "optimizer step", gradients, 0, part + self._bucket if self.stage == 3 else kept
        if self.stage < 3 and shares and self.is_cpu:
            yield "gathering weights", gradients if self.stage == 1 else 0, 0, self.width * self.filled


def _backward(
    config: RunConfig, stage: Stage, activations: Activations, shapes: list[ParameterShape], width: int
) -> Iterator[_Point]:
    """The moments of backward of a stage, each of them where it needs most."""
    # A weight's gradient is made in the weight's dtype before it is added to the sum.
    sizes = {shape.name: shape.local_elements for shape in shapes}
    vocabulary = sizes.get("head.weight") or sizes.get("embedding.word.weight", 0)
    layer = f"layers.{stage.layers.start}."
    down = sizes.get(f"{layer}mlp.down.weight", 0)
    in_layer = sum(elements for name, elements in sizes.items() if name.startswith(layer))
    alive, made, waiting, last = activations.kept, 0, 0, len(stage.layers)
    # Tied to the embedding, the output layer's gradient waits for the other one.
    is_tied = stage.is_first and stage.is_last and not config.model.untie_embeddings_and_output_weights
    if stage.is_last:
        yield _Point("backward of the output layer", alive, activations.head_temporary + width * vocabulary, 0)
        alive -= activations.head
        waiting = vocabulary if is_tied else 0
        made = vocabulary - waiting
    for size, again in zip(reversed(activations.group_sizes), reversed(activations.recomputed), strict=True):
        temporary = activations.layer_temporary + width * (waiting + down)
        yield _Point("backward of the layers", alive + again, temporary, made)
        alive -= sum(activations.layers[last - size : last])
        made += size * in_layer
        last -= size
    if stage.is_first:
        yield _Point("backward of the embedding", alive, width * vocabulary * (3 if is_tied else 1), made)
