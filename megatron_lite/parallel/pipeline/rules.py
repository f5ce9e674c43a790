"""The pipeline schedules by name, and what each of them asks of a configuration. No torch."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_lite.config.check import divisors, one_of, out_of_range
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.pipeline.partition import folded, looped, parse_pipeline_layout
from megatron_lite.parallel.pipeline.timeline import Action, Orders, timeline


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of forward and backward passes; its name is that of torch.distributed.pipelining."""

    name: str
    place: Callable[[int, int], tuple[int, ...]] = looped
    takes_many_stages: bool = True
    """A rank may hold several stages."""
    splits_backward: bool = False
    """Gradients of inputs and of weights are computed apart, to fill idle time with the latter."""


SCHEDULES = {
    schedule.name.lower(): schedule
    for schedule in (
        # Huang et al. 2019; Narayanan et al. 2019 and 2021; Lamy-Poirier 2023.
        Schedule("GPipe", takes_many_stages=False),
        Schedule("1F1B", takes_many_stages=False),
        Schedule("Interleaved1F1B"),
        Schedule("LoopedBFS"),
        # Qi et al. 2023 and 2024; DeepSeek-AI 2025.
        Schedule("InterleavedZeroBubble", splits_backward=True),
        Schedule("ZBVZeroBubble", folded, splits_backward=True),
        Schedule("DualPipeV", folded, splits_backward=True),
    )
}

_ACTION = re.compile(r"(\d+)([FIBW])(\d+)")


@dataclasses.dataclass(frozen=True)
class PipelinePlan:
    """A configuration's pipeline: its schedule, and the pipe rank of each stage."""

    schedule: Schedule
    placement: tuple[int, ...]
    csv: str | None = None
    """The file that the schedule is read from."""
    micro_batches: int | None = None
    """How many micro-batches a step must have, where the file says so."""
    orders: Orders | None = None
    """The actions of each rank, as the file has them."""

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def ends(self) -> tuple[int, int]:
        """The pipe ranks of the first and of the last stage."""
        return self.placement[0], self.placement[-1]

    def held_by(self, pipe_rank: int) -> list[int]:
        """The stages of a pipe rank, in order."""
        return [stage for stage, rank in enumerate(self.placement) if rank == pipe_rank]


def pipeline_plan(config: RunConfig) -> PipelinePlan:
    """The pipeline of a configuration. Raises ConfigError for what `problems` would say first."""
    parallel = config.parallel
    pipe, name = parallel.pipeline_model_parallel_size, parallel.pipeline_schedule
    if name is not None and name.lower().endswith(".csv"):
        return _read_csv(name, pipe)
    asked = _virtual_stages(config)
    if name is None:
        name = "1F1B" if asked in (None, 1) else "Interleaved1F1B"
    schedule = SCHEDULES.get(name.lower())
    if schedule is None:
        known = one_of(schedule.name for schedule in SCHEDULES.values())
        raise ConfigError(f"pipeline_schedule={name} is not known; choose {known}, or a file that ends in .csv.")
    many = 2 if schedule.place is folded else 1
    held = many if asked is None else asked
    if schedule.place is folded and held != 2:
        raise ConfigError(f"pipeline_schedule={schedule.name} has 2 stages on a rank, but {held} are asked for.")
    if held > 1 and not schedule.takes_many_stages:
        raise ConfigError(
            f"pipeline_schedule={schedule.name} has 1 stage on a rank, but {held} are asked for; choose "
            "Interleaved1F1B, or leave the virtual stages out."
        )
    return PipelinePlan(schedule, schedule.place(pipe, pipe * held))


def _virtual_stages(config: RunConfig) -> int | None:
    """Stages on a rank as the flags have it; None where they do not. Raises ConfigError."""
    parallel, layers = config.parallel, config.model.num_layers
    pipe, length = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    told: dict[str, int] = {}
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        told["num_virtual_stages_per_pipeline_rank"] = parallel.num_virtual_stages_per_pipeline_rank
    if length is not None:
        if layers % (pipe * length):
            legal = divisors(layers // pipe) if layers % pipe == 0 else []
            mend = f"choose {one_of(legal)}" if legal else "give num_virtual_stages_per_pipeline_rank instead"
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage={length} x pipeline_model_parallel_size={pipe} does not divide "
                f"num_layers={layers}; {mend}."
            )
        told["num_layers_per_virtual_pipeline_stage"] = layers // (pipe * length)
    if parallel.pipeline_model_parallel_layout is not None:
        stages = len(parse_pipeline_layout(parallel.pipeline_model_parallel_layout, layers))
        if stages % pipe:
            raise ConfigError(
                f"pipeline_model_parallel_layout={parallel.pipeline_model_parallel_layout} has {stages} stages, which "
                f"is no multiple of pipeline_model_parallel_size={pipe}."
            )
        told["pipeline_model_parallel_layout"] = stages // pipe
    if len(set(told.values())) > 1:
        both = ", ".join(f"{count} by {name}" for name, count in told.items())
        raise ConfigError(f"The stages on a pipeline rank are given differently: {both}; leave one out.")
    return next(iter(told.values()), None)


def _read_csv(path: str, pipe: int) -> PipelinePlan:
    """The plan of a CSV file in torch's form: a row a rank, an action such as 0F3 a cell. Raises ConfigError."""
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"pipeline_schedule={path} cannot be read: {error}.") from None
    if len(rows) != pipe:
        raise ConfigError(f"pipeline_schedule={path} is for {len(rows)} ranks, not {pipe}; it has a row for each.")
    where: dict[int, int] = {}
    orders: list[list[Action]] = [[] for _ in rows]
    for rank, row in enumerate(rows):
        for cell in filter(None, map(str.strip, row)):
            action = _ACTION.fullmatch(cell)
            if action is None:
                raise ConfigError(
                    f"pipeline_schedule={path} has {cell!r} in row {rank + 1}; an action is a stage, F, B, I or W, and "
                    "a micro-batch, as 0F3."
                )
            stage = int(action[1])
            if where.setdefault(stage, rank) != rank:
                raise ConfigError(
                    f"pipeline_schedule={path} has stage {stage} in rows {where[stage] + 1} and {rank + 1}."
                )
            orders[rank].append(Action(stage, action[2], int(action[3])))
    if sorted(where) != list(range(len(where))) or set(where.values()) != set(range(pipe)):
        raise ConfigError(
            f"pipeline_schedule={path} has stages {sorted(where)}; number them from 0, at least one a row."
        )
    if where[0] != 0:
        raise ConfigError(f"pipeline_schedule={path} has stage 0 in row {where[0] + 1}; it belongs in the first.")
    done: dict[tuple[int, int], list[str]] = defaultdict(list)
    for stage, kind, micro_batch in itertools.chain(*orders):
        done[stage, micro_batch].append(kind)
    count = 1 + max(micro_batch for _, micro_batch in done)
    for stage in where:
        for micro_batch in range(count):
            if (names := sorted(done[stage, micro_batch])) not in (["B", "F"], ["F", "I", "W"]):
                raise ConfigError(
                    f"pipeline_schedule={path} has {names} of micro-batch {micro_batch} in stage {stage}; each has F "
                    "and B, or F, I and W, once in every stage."
                )
    try:
        timeline(orders)
    except ValueError as error:
        raise ConfigError(f"pipeline_schedule={path} is an order in which {error}.") from None
    placement = tuple(where[stage] for stage in sorted(where))
    splits = any("W" in kinds for kinds in done.values())
    return PipelinePlan(Schedule(path, splits_backward=splits), placement, path, count, orders)


def problems(config: RunConfig, world_size: int) -> list[str]:
    """What keeps a configuration's pipeline from running, one sentence each."""
    parallel = config.parallel
    if out_of_range(config) or world_size % parallel.model_parallel_size:
        return []
    if parallel.pipeline_model_parallel_size == 1:
        return list(_without_effect(config))
    try:
        plan = pipeline_plan(config)
    except ConfigError as error:
        return error.problems
    return [*stage_problems(config), *_zero_problems(config, plan), *_batch_problems(config, plan, world_size)]


def _without_effect(config: RunConfig) -> Iterator[str]:
    names = (
        "pipeline_schedule pipeline_model_parallel_layout num_layers_per_virtual_pipeline_stage "
        "num_virtual_stages_per_pipeline_rank"
    )
    for name in names.split():
        if (value := getattr(config.parallel, name)) is not None:
            yield f"{name}={value} needs a pipeline; give --pipeline-model-parallel-size 2 or more, or leave it out."


def stage_problems(config: RunConfig) -> Iterator[str]:
    """What keeps a model from being cut into the stages of a pipeline that `pipeline_plan` takes."""
    plan = pipeline_plan(config)
    layers, layout = config.model.num_layers, config.parallel.pipeline_model_parallel_layout
    if layout is not None:
        counts = parse_pipeline_layout(layout, layers)
        if len(counts) != plan.stages:
            yield f"pipeline_model_parallel_layout={layout} has {len(counts)} stages, and the schedule {plan.stages}."
            return
        holding = {rank for rank, count in zip(plan.placement, counts, strict=True) if count} | set(plan.ends)
        if idle := sorted(set(plan.placement) - holding):
            yield f"pipeline_model_parallel_layout={layout} leaves pipeline rank {idle[0]} without anything to hold."
    elif plan.stages > layers:
        yield (
            f"pipeline_model_parallel_size={config.parallel.pipeline_model_parallel_size} with {plan.schedule.name} is "
            f"{plan.stages} stages, more than num_layers={layers}; choose at most {layers} stages."
        )


def _zero_problems(config: RunConfig, plan: PipelinePlan) -> Iterator[str]:
    stage = config.parallel.zero_stage
    if stage == 3 and plan.schedule.splits_backward:
        yield (
            f"pipeline_schedule={plan.schedule.name} computes the gradients of weights by themselves, when ZeRO 3 has "
            "taken the weights apart again; choose --zero-stage 2, or --pipeline-schedule Interleaved1F1B."
        )


def _batch_problems(config: RunConfig, plan: PipelinePlan, world_size: int) -> Iterator[str]:
    training = config.training
    data_size = world_size // config.parallel.model_parallel_size
    unit = training.micro_batch_size * data_size
    sizes = {training.batch_size(data_size)}
    if training.rampup_batch_size is not None and training.rampup_batch_size[1] > 0:
        sizes |= set(range(training.rampup_batch_size[0], max(sizes), training.rampup_batch_size[1]))
    for size in sorted(size for size in sizes if size >= unit and size % unit == 0):
        count = size // unit
        if (reason := _micro_batch_problem(plan, config.parallel.pipeline_model_parallel_size, count)) is not None:
            wrong, right = reason
            yield (
                f"{count} micro-batches = global_batch_size {size} / ({training.micro_batch_size} x {data_size} data "
                f"ranks) do not go with pipeline_schedule={plan.schedule.name}, which {wrong}; choose a "
                f"global_batch_size of {right * unit}."
            )


def _micro_batch_problem(plan: PipelinePlan, pipe: int, count: int) -> tuple[str, int] | None:
    """What a schedule has against that many micro-batches, and the nearest number above that it takes."""
    if plan.micro_batches is not None:
        return None if count == plan.micro_batches else (f"is for {plan.micro_batches}", plan.micro_batches)
    name = plan.schedule.name
    if name.startswith("Interleaved") and count % max(1, count // pipe):
        return f"takes a multiple of its {pipe} ranks", -(-count // pipe) * pipe
    if name in ("1F1B", "DualPipeV") and count < plan.stages:
        return f"takes at least its {plan.stages} stages", plan.stages
    return None
