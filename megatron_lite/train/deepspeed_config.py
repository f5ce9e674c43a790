"""The DeepSpeed JSON: derived from the flags, with a user's file merged in. Neither torch nor deepspeed."""

from __future__ import annotations

import json
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.config import check
from megatron_lite.config.run import RunConfig
from megatron_lite.config.typed_values import nearest
from megatron_lite.errors import ConfigError

_WIRE_TYPES = ("fp32", "bf16", "fp16")

PASSED_THROUGH: Mapping[str, Any] = {
    "zero_optimization": dict, "communication_data_type": _WIRE_TYPES,
    "seq_parallel_communication_data_type": _WIRE_TYPES, "prescale_gradients": bool,
    "gradient_predivide_factor": float, "sparse_gradients": bool, "disable_allgather": bool, "comms_logger": dict,
    "flops_profiler": dict, "aio": dict, "steps_per_print": int, "wall_clock_breakdown": bool,
    "memory_breakdown": bool, "dump_state": bool, "timers": dict, "tensorboard": dict, "wandb": dict,
    "csv_monitor": dict, "comet": dict, "disable_python_gc": bool, "zero_force_ds_cpu_optimizer": bool,
}  # fmt: skip
"""Top-level keys whose values are DeepSpeed's own business, and what they are: a type, or one of some words."""

WITHOUT_SCHEMA: Mapping[str, Mapping[str, type]] = {
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int, "top_modules": int,
        "detailed": bool, "output_file": str,
    },
    "aio": {
        "block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
        "overlap_events": bool, "use_gds": bool,
    },
    "timers": {"throughput": dict},
}  # fmt: skip
"""Sections that DeepSpeed takes as they are: it reads these keys and passes over all others in silence."""

_KINDS: Mapping[str, Any] = {
    **PASSED_THROUGH,
    **dict.fromkeys(("bf16", "fp16", "data_types"), dict),
    **{f"zero_optimization.{name}": dict for name in ("offload_optimizer", "offload_param", "zenflow", "leaf_module")},
    **{f"{section}.{name}": kind for section, kinds in WITHOUT_SCHEMA.items() for name, kind in kinds.items()},
}
_KIND_WORDS = {dict: "an object of settings: {...}", bool: "true or false", int: "a whole number", float: "a number",
               str: "text"}  # fmt: skip

REDUCTION_KEYS = frozenset({
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
    "zero_optimization.reduce_bucket_size", "zero_optimization.reduce_scatter", "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients", "zero_optimization.round_robin_gradients",
    "zero_optimization.use_multi_rank_bucket_allreduce", "zero_optimization.compute_grad_norm",
})  # fmt: skip
"""How DeepSpeed reduces gradients: without effect where that is not left to it."""

BUCKET_ELEMENTS = 50_000_000
"""Elements DeepSpeed reduces or gathers at once; its own default, ten times as many, is 2 GB of buffer."""

REFUSED = {
    "optimizer": "set --optimizer, --lr, --weight-decay, --adam-beta1, ... instead",
    "scheduler": "set --lr-decay-style, --lr-warmup-iters, --min-lr, ... instead",
    "activation_checkpointing": "set --recompute-granularity instead",
    "amp": "set --bf16 or --fp16 instead",
    "torch_autocast": "set --bf16 or --fp16 instead",
    "curriculum_learning": "set --curriculum-seq-length-min, --curriculum-seq-length-samples, ... instead",
    "data_efficiency": "training order follows from the flags alone",
    "dataloader_drop_last": "training order follows from the flags alone",
    "checkpoint": "checkpoints are set by --save, --load, ...",
    "elasticity": "another number of ranks needs no setting; start again with --resume auto",
    "pipeline": "DeepSpeed's pipeline engine is not used",
    "tensor_parallel": "set --tensor-model-parallel-size instead",
    "sparse_attention": "DeepSpeed's attention is not used",
    "compression_training": "it is not in this version",
    "progressive_layer_drop": "it is not in this version",
    "quantize_training": "it is not in this version",
    "eigenvalue": "it is not in this version",
    "compile": "it is not in this version",
}
"""Sections that would act behind the flags' back, and what to do instead."""


_FP32_SUMS = {"grad_accum_dtype": "fp32"}
"""Gradients of 16-bit weights add up in fp32."""


def derive(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed JSON that the flags stand for.

    The caller owns accumulation: DeepSpeed is told of one micro-batch a step and never divides by
    their number. 16-bit gradients travel and add up in fp32, as in Megatron-LM.
    """
    precision = config.precision
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {
            "stage": config.effective_zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision.dtype == "bf16"},
        "fp16": {"enabled": precision.dtype == "fp16"},
    }
    if config.parallel.overlap_grad_reduce and config.effective_zero_stage > 1:
        derived["zero_optimization"]["overlap_comm"] = True
    if precision.dtype != "fp32":
        derived["communication_data_type"] = "fp32"
        if config.effective_zero_stage > 1:
            # In stage 1 the parameters themselves accumulate in fp32; DeepSpeed would take another
            # optimizer wrapper there, which cannot coalesce reductions.
            derived["data_types"] = dict(_FP32_SUMS)
    if precision.dtype == "fp16":
        derived["fp16"] |= {
            "loss_scale": precision.loss_scale or 0,
            "initial_scale_power": int(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": int(precision.min_loss_scale),
        }
    return derived


def for_own_gradients(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """`settings` for DeepSpeed to take gradients that are summed, measured and clipped already.

    None where DeepSpeed does that by itself: in stages 2 and 3, which partition gradients within
    backward.
    """
    zero = settings["zero_optimization"]
    if zero["stage"] != 1:
        return None
    own = {"contiguous_gradients": False, "round_robin_gradients": False, "compute_grad_norm": False}
    changed = {**settings, "gradient_clipping": 0.0, "zero_optimization": {**zero, **own}}
    if settings["bf16"]["enabled"]:
        changed["bf16"] = {**settings["bf16"], "check_grad_overflow": False}
    return changed


def _stated(config: RunConfig, data_size: int) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Dotted JSON key to the values that agree with the flags and the flag to name otherwise."""
    training, precision = config.training, config.precision
    batch = training.batch_size(data_size)
    micro_batches = batch // (training.micro_batch_size * data_size)
    stated: dict[str, tuple[tuple[Any, ...], str]] = {
        "train_batch_size": ((batch,), f"--global-batch-size {batch}"),
        "train_micro_batch_size_per_gpu": (
            (training.micro_batch_size,),
            f"--micro-batch-size {training.micro_batch_size}",
        ),
        "gradient_accumulation_steps": (
            (1, micro_batches),
            f"--global-batch-size {batch} = --micro-batch-size {training.micro_batch_size} x {data_size} data ranks "
            f"x {micro_batches}",
        ),
        "gradient_clipping": ((config.optimizer.clip_grad,), f"--clip-grad {config.optimizer.clip_grad:g}"),
        "zero_optimization.stage": (
            (config.parallel.zero_stage, config.effective_zero_stage),
            f"--zero-stage {config.parallel.zero_stage}",
        ),
        "bf16.enabled": ((precision.dtype == "bf16",), "--bf16" if precision.dtype == "bf16" else "--no-bf16"),
        "fp16.enabled": ((precision.dtype == "fp16",), "--fp16" if precision.dtype == "fp16" else "--no-fp16"),
        "managed_gradient_accumulation": ((True,), "the training step, which sets the boundary by itself"),
        "zero_allow_untested_optimizer": ((True,), "the optimizers, which are not DeepSpeed's"),
        "gradient_allreduce_op": (("mean",), "the training step, which divides by the global token count"),
        "data_types.grad_accum_dtype": (("fp32",), "the training step, which accumulates in fp32"),
    }
    if config.parallel.overlap_grad_reduce:
        stated["zero_optimization.overlap_comm"] = ((True,), "--overlap-grad-reduce")
    if precision.dtype == "fp16":
        scale = "dynamic" if precision.loss_scale is None else f"{precision.loss_scale:g}"
        derived = derive(config)["fp16"]
        stated |= {
            "fp16.loss_scale": ((derived["loss_scale"],), f"--loss-scale {scale}"),
            "fp16.initial_scale_power": (
                (derived["initial_scale_power"],),
                f"--initial-loss-scale {precision.initial_loss_scale:g}",
            ),
            "fp16.loss_scale_window": (
                (precision.loss_scale_window,),
                f"--loss-scale-window {precision.loss_scale_window}",
            ),
            "fp16.hysteresis": ((precision.hysteresis,), f"--hysteresis {precision.hysteresis}"),
            "fp16.min_loss_scale": ((precision.min_loss_scale,), f"--min-loss-scale {precision.min_loss_scale:g}"),
        }
    return stated


def _misfit(name: str, value: Any) -> str | None:
    """What is wrong with the kind of a value; null within a section is its default."""
    expected = _KINDS.get(name)
    if expected is None or (value is None and expected is not dict) or (value is None and "." in name):
        return None
    if isinstance(expected, tuple):
        if value in expected:
            return None
        words = f"one of {', '.join(expected)}"
    else:
        fits = (int, float) if expected is float else expected
        if isinstance(value, fits) and not (isinstance(value, bool) and expected is not bool):
            return None
        words = _KIND_WORDS[expected]
    return f"{name} is {json.dumps(value)} in the DeepSpeed configuration, but should be {words}."


def _unknown(name: str, hint: str) -> str:
    return f"{name} is not a known key of a DeepSpeed configuration{hint or '; remove it'}."


def schema_problems(user: Mapping[str, Any], schemas: Mapping[str, type]) -> list[str]:
    """What DeepSpeed's schemas, pydantic models by section, do not admit in a user's JSON, one sentence each."""
    found = []
    for section in sorted(user.keys() & schemas.keys()):
        try:
            schemas[section](**user[section])
        except ValueError as error:  # pydantic's, which this room does without
            found += [_schema_problem(section, entry, schemas[section]) for entry in error.errors(include_url=False)]
    return found


def _schema_problem(section: str, error: Mapping[str, Any], schema: Any) -> str:
    *parents, last = error["loc"]
    name = ".".join(map(str, [section, *parents, last]))
    if error["type"] != "extra_forbidden":
        return f"{name} is {json.dumps(error['input'])} in the DeepSpeed configuration: {error['msg']}."
    for parent in parents:
        annotation = schema.model_fields[parent].annotation
        schema = next(part for part in (annotation, *typing.get_args(annotation)) if hasattr(part, "model_fields"))
    return _unknown(name, nearest(str(last), [field.alias or name for name, field in schema.model_fields.items()]))


def _without_auto(value: Any) -> Any:
    """`value` without the entries that say "auto": the flags, or else DeepSpeed's defaults, decide them."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def merge(config: RunConfig, data_size: int, user: Mapping[str, Any]) -> dict[str, Any]:
    """The derived JSON with a user's merged in.

    Stage 1 with its optimizer offloaded becomes stage 2: there DeepSpeed adds gradients up itself, in stage 1 in
    16 bits. Raises ConfigError with every value that contradicts a flag, section that would act beside the
    flags, and unknown key.
    """
    merged = derive(config)
    stated = _stated(config, data_size)
    owned = {key.partition(".")[0] for key in stated}
    problems: list[str] = []
    for key, value in user.items():
        if key in REFUSED:
            if value not in (False, None, {}, {"enabled": False}):
                problems.append(f"The section {key} of the DeepSpeed configuration is refused: {REFUSED[key]}.")
            continue
        if key not in owned | PASSED_THROUGH.keys():
            problems.append(_unknown(key, nearest(key, owned | PASSED_THROUGH.keys() | REFUSED.keys())))
            continue
        entries = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        for name, inner in entries.items():
            if misfit := _misfit(name, inner):
                problems.append(misfit)
            elif key in WITHOUT_SCHEMA and (last := name.partition(".")[2]) not in WITHOUT_SCHEMA[key]:
                problems.append(_unknown(name, nearest(last, WITHOUT_SCHEMA[key])))
            elif name in stated:
                agreeing, flag = stated[name]
                if inner not in agreeing:
                    problems.append(
                        f"{name} is {json.dumps(inner)} in the DeepSpeed configuration, which contradicts {flag}; "
                        "change one, or leave it out of the file."
                    )
            elif key in PASSED_THROUGH:
                if name == key:
                    merged[key] = inner
                else:
                    merged.setdefault(key, {})[name.partition(".")[2]] = inner
            elif not isinstance(section := merged.get(key), dict) or section.get("enabled", True):
                problems.append(f"{name} cannot be set by a DeepSpeed configuration here; leave it out of the file.")
    problems += _zero_problems(merged["zero_optimization"], config.optimizer.optimizer)
    if problems:
        raise ConfigError(problems)
    zero = merged["zero_optimization"]
    if zero["stage"] == 1 and _offload_device(zero, "offload_optimizer") != "none":
        zero["stage"] = 2
        if config.precision.dtype != "fp32":
            merged["data_types"] = dict(_FP32_SUMS)
    return merged


def _offload_device(zero: Mapping[str, Any], section: str) -> str:
    return (zero.get(section) or {}).get("device", "none")


_PARTIAL = {"mics_shard_size": -1, "zero_hpz_partition_size": 1}
"""Keys that shard over a part of the data ranks, and their values that do not."""
_OLD_SPELLINGS = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_params": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory": true in offload_optimizer or offload_param',
}


def _zero_problems(zero: Mapping[str, Any], optimizer: str) -> list[str]:
    """What of DeepSpeed's ZeRO section does not go with its stage, with the optimizer, or with checkpoints."""
    stage = zero["stage"]
    problems = []
    for section, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _offload_device(zero, section)
        if device != "none" and stage < least:
            problems.append(f"zero_optimization.{section} needs --zero-stage {least} or more, but it is {stage}.")
        if device == "nvme":
            problems.append(
                f'zero_optimization.{section}.device is "nvme", but checkpoints are read from memory and written to '
                'it; choose "cpu".'
            )
    for name, whole in _PARTIAL.items():
        if zero.get(name) not in (None, whole):
            problems.append(
                f"zero_optimization.{name} is {zero[name]}, but state is sharded and saved over all data ranks; leave "
                "it out."
            )
    for name, spelling in _OLD_SPELLINGS.items():
        if zero.get(name):
            problems.append(f"zero_optimization.{name} is an old spelling; write {spelling} instead.")
    if optimizer == "adamw8bit":
        offload = zero.get("offload_optimizer") or {}
        # Each of these has DeepSpeed move or update optimizer state itself, and it knows only that of 32 bits.
        held = {
            "offload_optimizer.ratio": offload.get("ratio", 1) != 1,
            "offload_optimizer.super_offload": bool(offload.get("super_offload")),
            "zenflow": bool(zero.get("zenflow")),
        }
        problems += [
            f"zero_optimization.{name} does not go with --optimizer adamw8bit; leave it out, or take --optimizer adamw."
            for name, is_set in held.items()
            if is_set
        ]
    return problems


def problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything in --deepspeed_config that can be said without DeepSpeed to be wrong, one sentence each."""
    path = config.parallel.deepspeed_config
    if path is None or not os.path.isfile(path) or check.out_of_range(config):
        return []
    try:
        merge(config, max(1, world_size // config.parallel.model_parallel_size), read(path))
    except ConfigError as error:
        return error.problems
    return []


def read(path: str | Path) -> dict[str, Any]:
    """A user's DeepSpeed JSON without what it leaves "auto". Raises ConfigError if it is missing or no JSON object."""
    try:
        user = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The DeepSpeed configuration {path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The DeepSpeed configuration {path} is not valid JSON: {error}.") from error
    if not isinstance(user, dict):
        raise ConfigError(f"The DeepSpeed configuration {path} must be a JSON object, not {type(user).__name__}.")
    return _without_auto(user)


def build(config: RunConfig, data_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: derived, with --deepspeed_config merged in if given."""
    path = config.parallel.deepspeed_config
    user = read(path) if path else {}
    merged = merge(config, data_size, user)
    given = {*user, *(f"zero_optimization.{name}" for name in user.get("zero_optimization", {}))}
    if (stage := merged["zero_optimization"]["stage"]) != config.effective_zero_stage:
        log.once(
            f"ZeRO {config.effective_zero_stage} with its optimizer offloaded runs as ZeRO {stage}, which adds the "
            "gradients of micro-batches up in fp32"
        )
    if for_own_gradients(merged) is not None and (unused := sorted(given & REDUCTION_KEYS)):
        log.warn(
            f"ZeRO 1 sums gradients by itself (see --overlap-grad-reduce): {', '.join(unused)} in {path} has no effect"
        )
    return merged
