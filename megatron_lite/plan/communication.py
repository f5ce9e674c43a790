"""The bytes that a rank sends in a training step, in closed form, by axis.

A collective counts as by a ring, which sends least: of a tensor of n bytes that r ranks join, share out or sum up in
parts, each sends n (r - 1) / r, and twice that for a sum that all of them get. With A bytes of hidden states of a
micro-batch on this rank's part of the sequences:

    axis            what a micro-batch sends                              what a step sends besides
    tensor          8 A (t - 1) / t a layer, 2 A (t - 1) / t at either    gradient norm
                    end; 16 bytes a token to each rank for the loss
    context, ring   keys and values c - 1 times forward and backward,
                    their fp32 gradients c times
    context, a2a    queries, keys, values and outputs (c - 1) / c         loss
                    forward and backward
    pipe            A / t with sequence parallelism, else A, to the       tied embedding's gradient, gradient norm, loss
                    next stage and back
    data x context  ZeRO 2: 8 n (r - 1) / r; ZeRO 3: weights once or      ZeRO 0: 8 n (r - 1) / r
                    twice, and 4 n (r - 1) / r                            ZeRO 1: (4 + w) n (r - 1) / r
                                                                          ZeRO 2: w n (r - 1) / r

for n elements in w bytes each; recompute sends again what its layers send forward. Gradients travel in fp32 always,
ZeRO 2 and 3 in a pipeline once a step. `monitor/traffic.py` counts what is sent, and a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.pipeline.partition import Stage
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.plan.activations import FP32, element_bytes
from megatron_lite.plan.memory import micro_batches
from megatron_lite.plan.parameters import ParameterShape
from megatron_lite.plan.stages import shapes_of_rank, stages_of_rank

FP64 = 8
LOSS_STATISTICS = 4 * FP32
"""Bytes a token that tensor ranks join the loss by."""
DEEPSPEED_SCALARS = {2: FP32, 3: 2 * FP32}
"""What DeepSpeed sums for the norm of a parameter group's gradients, by ZeRO stage; the engine once for all groups over
the stages of a pipeline."""
FLAT_UNIT = 2
"""DeepSpeed pads flat weights to a multiple of so many elements for each data rank."""
KEPT_SMALL = 100_000
"""Elements of a parameter up to which stage 3 keeps it whole (DeepSpeed's `stage3_param_persistence_threshold`)."""
REUSED = 10**9
"""Elements between two uses of a parameter up to which stage 3 keeps it (DeepSpeed's `stage3_max_reuse_distance`)."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends in one step, for one purpose, within its group along `axes`."""

    purpose: str
    axes: tuple[str, ...]
    bytes: Fraction


def by_axes(sent: Sequence[Sent]) -> dict[str, Fraction]:
    """The bytes sent within each group, "data+context" where it lies along both."""
    total: dict[str, Fraction] = {}
    for entry in sent:
        name = "+".join(entry.axes)
        total[name] = total.get(name, Fraction(0)) + entry.bytes
    return total


def sent_in_a_step(config: RunConfig, *, data_size: int, vocab_size: int, pipe_rank: int = 0) -> list[Sent]:
    """What the ranks at a place of the pipeline send in a step, at the full batch size.

    Of ZeRO 3 in a pipeline it is the most: DeepSpeed keeps some small parameters, by no fixed rule.
    """
    parallel = config.parallel
    sizes = {
        "pipe": parallel.pipeline_model_parallel_size,
        "data": data_size,
        "context": parallel.context_parallel_size,
        "tensor": parallel.tensor_model_parallel_size,
    }
    rank = _Rank(
        config,
        sizes,
        count=micro_batches(config, data_size),
        stages=stages_of_rank(config, vocab_size, pipe_rank),
        shapes=shapes_of_rank(config, vocab_size, pipe_rank),
        pipe_rank=pipe_rank,
    )
    entries = [*rank.tensor(), *rank.context(), *rank.pipe(), *rank.replicas(), *rank.scalars()]
    return [
        Sent(purpose, tuple(axis for axis in axes if sizes[axis] > 1), Fraction(number))
        for purpose, axes, number in entries
        if number
    ]


_Entry = tuple[str, tuple[str, ...], Fraction | int]
"""Purpose, axes of the group, bytes."""


@dataclasses.dataclass(frozen=True)
class _Rank:
    """A rank, of which all that have its place in the pipeline send as much."""

    config: RunConfig
    sizes: Mapping[str, int]
    count: int
    """Micro-batches of a step."""
    stages: Sequence[Stage]
    shapes: Sequence[ParameterShape]
    pipe_rank: int

    def tensor(self) -> Iterator[_Entry]:
        size, model = self.sizes["tensor"], self.config.model
        hidden = self._ring(self._hidden, "tensor")
        layers = sum(len(stage.layers) for stage in self.stages)
        again, groups = self._recomputed
        # What is made again stops at the last thing to keep, before the last sum of a group of layers.
        omitted = 1 if self.config.parallel.sequence_parallel else 2
        passes = 8 * layers + 4 * again - omitted * groups + 2 * self._begins + 2 * self._ends
        yield "hidden states", ("tensor",), self.count * passes * hidden
        joined = self._tokens * LOSS_STATISTICS * (size - 1)
        yield "loss", ("tensor",), self.count * self._ends * joined
        shared = sum(shape.elements for shape in self.shapes if self._is_summed(shape.name))
        yield "gradients of norms and biases", ("tensor",), self.count * 2 * self._ring(shared * self._width, "tensor")
        replicas = max(1, size // model.kv_heads)
        held = sum(shape.local_elements for shape in self.shapes if ".key_value." in shape.name)
        copies = Fraction(2 * held * self._width * (replicas - 1), replicas)
        yield "gradients of key/value heads", ("tensor",), self.count * copies

    def context(self) -> Iterator[_Entry]:
        size, model = self.sizes["context"], self.config.model
        tensor = self.sizes["tensor"]
        layers = sum(len(stage.layers) for stage in self.stages)
        forwards = layers + self._recomputed[0]
        heads, groups = model.num_attention_heads // tensor, max(1, model.kv_heads // tensor)
        if self.config.parallel.cp_comm_type == "p2p":
            pair = 2 * self._tokens * groups * model.head_dim
            passed = (forwards + layers) * (size - 1) * pair * self._width
            summed = layers * size * pair * FP32 if size > 1 else 0
            yield "keys and values", ("context",), self.count * passed
            yield "gradients of keys and values", ("context",), self.count * summed
            return
        groups = max(groups, size)
        every = self._tokens * model.head_dim * (2 * heads + 2 * groups) * self._width
        yield "heads for tokens", ("context",), self.count * (forwards + layers) * self._ring(every, "context")

    def pipe(self) -> Iterator[_Entry]:
        plan, parallel = pipeline_plan(self.config), self.config.parallel
        parts = self.sizes["tensor"] if parallel.sequence_parallel else 1
        elsewhere = 0
        for stage in self.stages:
            for neighbour in (stage.index - 1, stage.index + 1):
                elsewhere += 0 <= neighbour < stage.count and plan.placement[neighbour] != self.pipe_rank
        yield "hidden states and their gradients", ("pipe",), self.count * elsewhere * Fraction(self._hidden, parts)
        is_tied = not self.config.model.untie_embeddings_and_output_weights
        if is_tied and self._begins != self._ends:
            word = next(shape for shape in self.shapes if shape.name == "embedding.word.weight")
            # The sum of two ranks: each sends one half and then the other.
            yield "gradient of the tied embedding", ("pipe",), FP32 * word.local_elements

    def replicas(self) -> Iterator[_Entry]:
        stage, elements = self.config.effective_zero_stage, sum(shape.local_elements for shape in self.shapes)
        times = 1 if self.sizes["pipe"] > 1 else self.count
        if stage == 0:
            yield "gradients", REPLICAS, 2 * self._ring(FP32 * elements, *REPLICAS)
        elif stage == 1:
            yield "gradients", REPLICAS, self._ring(FP32 * self._flat_elements, *REPLICAS)
        elif stage == 2:
            yield "gradients", REPLICAS, times * 2 * self._ring(FP32 * elements, *REPLICAS)
        else:
            yield from self._partitioned(times)
        if stage in (1, 2):
            yield "weights", REPLICAS, self._ring(self._width * self._flat_elements, *REPLICAS)

    def _partitioned(self, times: int) -> Iterator[_Entry]:
        ranks = self._replicas
        padded = [-(-shape.local_elements // ranks) * ranks for shape in self.shapes]
        large = sum(size for size, shape in zip(padded, self.shapes, strict=True) if shape.local_elements > KEPT_SMALL)
        small = sum(padded) - large
        again = max(0, large - REUSED // 2)
        gathered = self.count * (large + again) + small
        if self.sizes["pipe"] > 1:
            # DeepSpeed does not know what comes next, and keeps nothing from forward to backward.
            gathered = 2 * self.count * sum(padded)
        yield "weights", REPLICAS, self._ring(self._width * gathered, *REPLICAS)
        yield "gradients", REPLICAS, times * self._ring(FP32 * sum(padded), *REPLICAS)

    def scalars(self) -> Iterator[_Entry]:
        for axis in ("data", "context", "pipe"):
            yield "loss", (axis,), 2 * self._ring(FP32, axis)
        stage = self.config.effective_zero_stage
        over_data = over_model = FP64
        if stage > 1:
            over_data = DEEPSPEED_SCALARS[stage] * len(self._groups)
            over_model = DEEPSPEED_SCALARS[stage] if self.sizes["pipe"] > 1 else over_data
        if stage:
            yield "gradient norm", REPLICAS, 2 * self._ring(over_data, *REPLICAS)
        yield "gradient norm", ("pipe", "tensor"), 2 * self._ring(over_model, "pipe", "tensor")
        if stage == 2 and self._width < FP32:
            for axes in (REPLICAS, ("pipe", "tensor")):
                yield "overflow", axes, 2 * self._ring(1, *axes)

    def _ring(self, number: int, *axes: str) -> Fraction:
        """What a rank sends of a tensor of so many bytes in one pass round its group."""
        size = 1
        for axis in axes:
            size *= self.sizes[axis]
        return Fraction(number * (size - 1), size)

    @property
    def _replicas(self) -> int:
        return self.sizes["data"] * self.sizes["context"]

    @property
    def _width(self) -> int:
        return element_bytes(self.config.precision)

    @property
    def _tokens(self) -> int:
        return self.config.training.micro_batch_size * self.config.data.seq_length // self.sizes["context"]

    @property
    def _hidden(self) -> int:
        return self._tokens * self.config.model.hidden_size * self._width

    @property
    def _begins(self) -> bool:
        return any(stage.is_first for stage in self.stages)

    @property
    def _ends(self) -> bool:
        return any(stage.is_last for stage in self.stages)

    def _is_summed(self, name: str) -> bool:
        """Whether tensor ranks, which all have a parameter whole, each make a part of its gradient: where it acts on
        their own heads, or on their parts of the sequence."""
        if name.endswith((".query_norm.weight", ".query_norm.bias", ".key_norm.weight", ".key_norm.bias")):
            return True
        ends = ("norm.weight", "norm.bias", "attention.output.bias", "mlp.down.bias", "embedding.position.weight")
        return self.config.parallel.sequence_parallel and name.endswith(ends)

    @property
    def _recomputed(self) -> tuple[int, int]:
        """Layers whose forward pass is made again in backward, and the groups in which it is."""
        training = self.config.training
        if training.recompute_granularity != "full":
            return 0, 0
        lengths = [len(stage.layers) for stage in self.stages]
        if training.recompute_method == "uniform":
            return sum(lengths), sum(-(-length // training.recompute_num_layers) for length in lengths)
        layers = sum(min(training.recompute_num_layers, length) for length in lengths)
        return layers, layers

    @property
    def _flat_elements(self) -> int:
        """Elements of the optimizer's parameter groups, each flat and padded for the ranks that share it."""
        unit = FLAT_UNIT * self._replicas
        return sum(-(-elements // unit) * unit for elements in self._groups)

    @property
    def _groups(self) -> list[int]:
        """Elements of the optimizer's parameter groups here."""
        groups: dict[tuple[bool, bool], int] = {}
        for shape in self.shapes:
            apart = self.config.optimizer.optimizer == "adamw8bit" and not shape.name.startswith("layers.")
            key = (shape.is_vector, apart and not shape.is_vector)
            groups[key] = groups.get(key, 0) + shape.local_elements
        return list(groups.values())
