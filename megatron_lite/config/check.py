"""The rules that hold a configuration together: every broken one is a sentence with its numbers and
the nearest legal values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import values_of
from megatron_lite.credentials import are_hidden, without_credentials


def problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything that is wrong with a configuration on `world_size` ranks, one sentence each."""
    out_of_range = dict(_ranges(config))
    found = list(out_of_range.values())
    checks = {
        _heads: ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "rotary_percent"),
        tensor_problems: (*_SHARING, "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
        _lengths: ("seq_length", "max_position_embeddings", *_SHARING),
        _context: ("seq_length", "num_attention_heads", "num_query_groups", *_SHARING),
        _recompute: ("recompute_num_layers", "num_layers"),
        _batch: (
            *_SHARING,
            "micro_batch_size",
            "global_batch_size",
            "gradient_accumulation_steps",
            "rampup_batch_size",
        ),
        _run_length: (),
        _learning_rate: ("lr", "min_lr"),
        _precision: ("initial_loss_scale", "min_loss_scale"),
        _checkpoint: (),
        _files: (),
    }
    for check, needed in checks.items():
        if not out_of_range.keys() & set(needed):
            found += check(config, world_size)
    return found


_SHARING = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def out_of_range(config: RunConfig) -> set[str]:
    """Names of fields whose number is outside its range: nothing can be derived from those."""
    return set(dict(_ranges(config)))


def notices(config: RunConfig) -> list[str]:
    """What is allowed and has no effect, one sentence each, for the log."""
    found = []
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        found.append("--sequence-parallel has no effect at tensor_model_parallel_size=1.")
    if parallel.cp_comm_type != "p2p" and parallel.context_parallel_size == 1:
        found.append(f"--cp-comm-type {parallel.cp_comm_type} has no effect at context_parallel_size=1.")
    if parallel.deepspeed_config and parallel.zero_stage == 0 and config.precision.dtype == "fp32":
        found.append(f"--deepspeed_config {parallel.deepspeed_config} has no effect at --zero-stage 0 in fp32.")
    if config.training.recompute_granularity != "full" and config.training.recompute_num_layers != 1:
        found.append("--recompute-num-layers has no effect without --recompute-granularity full.")
    if parallel.pipeline_model_parallel_size > 1 and config.logging.log_histograms_interval:
        found.append("--log-histograms-interval shows the layers of the first pipeline rank alone.")
    if config.model.swiglu and config.model.activation_func != "gelu_tanh":
        found.append(f"--activation-func {config.model.activation_func} has no effect with --swiglu.")
    if config.model.use_rope_scaling and config.model.position_embedding_type != "rope":
        found.append("--use-rope-scaling has no effect without --position-embedding-type rope.")
    if config.kernels.memory_efficient_layer_norm and config.kernels.norm_backend == "torch":
        found.append("--memory-efficient-layer-norm has no effect with --norm-backend torch.")
    copy_to = config.checkpoint.save_copy_to or ""
    if without_credentials(copy_to) != copy_to:
        found.append(
            f"--save-copy-to {copy_to} came with credentials: launchers and lists of processes may show them; better "
            "leave them to the environment or a file of the service."
        )
    return found


def precision_problems(dtype: str, device_type: str, has_fp16: bool) -> list[str]:
    """What speaks against training in `dtype` ("fp32", "bf16", "fp16") on a device; known only at the start."""
    if dtype == "fp16" and not has_fp16:
        return [f"--fp16 needs a device with fast fp16, but this {device_type} has none; use --bf16 or fp32."]
    return []


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def one_of(choices: Iterable[int | str]) -> str:
    """ "1, 2, 3 or 6"."""
    words = [str(choice) for choice in choices]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _multiples_around(number: int, unit: int) -> str:
    lower = number // unit * unit
    return one_of([lower, lower + unit] if lower else [unit])


def _does_not_divide(name: str, divisor: int, of: str, number: int) -> str:
    return f"{name}={divisor} does not divide {of}={number}; choose {one_of(divisors(number))}."


_AT_LEAST = {
    1: (
        "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size "
        "max_position_embeddings rope_scaling_original_length vocab_size make_vocab_size_divisible_by "
        "tensor_model_parallel_size "
        "pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage "
        "context_parallel_size ddp_bucket_size "
        "loss_scale_window hysteresis min_loss_scale lr_decay_iters lr_decay_samples seq_length sample_stride "
        "micro_batch_size global_batch_size gradient_accumulation_steps train_iters train_samples train_tokens "
        "curriculum_seq_length_min curriculum_seq_length_samples curriculum_seq_length_step curriculum_seq_length_root "
        "recompute_num_layers eval_iters early_stopping_patience check_weights_interval exit_interval save_interval "
        "keep_last keep_every log_interval log_histograms_interval curriculum_difficulty_samples"
    ),
    0: (
        "init_method_std z_loss min_lr lr_warmup_iters lr_warmup_samples lr_warmup_init weight_decay clip_grad "
        "num_workers seed eval_interval ckpt_step hang_limit_minutes loss_chunk_size"
    ),
}
_ABOVE_ZERO = (
    "norm_epsilon rotary_base rope_scaling_factor rope_scaling_low_freq_factor rope_scaling_high_freq_factor "
    "distributed_timeout_minutes loss_scale initial_loss_scale lr adam_eps train_epochs exit_duration_in_mins "
    "exit_signal_grace_seconds data_blend_temperature data_blend_unimax data_max_epochs"
)
_FRACTIONS = "hidden_dropout attention_dropout label_smoothing lr_warmup_fraction adam_beta1 adam_beta2 sgd_momentum"


def _ranges(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Field name and problem for each number outside the range of its field."""
    values = values_of(config)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield name, f"{name}={value} is not a finite number."
    for least, names in _AT_LEAST.items():
        for name in names.split():
            if values[name] is not None and values[name] < least:
                out = " or turn validation off by --eval-interval 0" if name == "eval_iters" else ""
                yield name, f"{name}={values[name]} is too small; give {least} or more{out}."
    for name in _ABOVE_ZERO.split():
        if values[name] is not None and values[name] <= 0:
            yield name, f"{name}={values[name]} is too small; give a number above 0."
    for name in _FRACTIONS.split():
        if values[name] is not None and not 0 <= values[name] < 1:
            yield name, f"{name}={values[name]} is out of range; give a number from 0 to below 1."
    if not 0 < values["rotary_percent"] <= 1:
        yield "rotary_percent", f"rotary_percent={values['rotary_percent']} is out of range; give above 0 up to 1."
    if values["zero_stage"] not in (0, 1, 2, 3):
        yield "zero_stage", f"zero_stage={values['zero_stage']} does not exist; choose 0, 1, 2 or 3."
    for value in values["rampup_batch_size"] or ():
        if value < 1:
            yield "rampup_batch_size", f"rampup_batch_size has the value {value}; give three numbers of 1 or more."
            break


def _heads(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.kv_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"num_attention_heads={heads} does not divide hidden_size={model.hidden_size}; choose a hidden_size of "
            f"{_multiples_around(model.hidden_size, heads)}, or give --kv-channels."
        )
        return
    if heads % groups:
        yield _does_not_divide("num_query_groups", groups, "num_attention_heads", heads)
    if model.position_embedding_type == "rope":
        rotated = int(model.head_dim * model.rotary_percent)
        if rotated < 2 or rotated % 2:
            even = max(2, rotated - rotated % 2)
            yield (
                f"Rotary embedding turns pairs, but rotary_percent={model.rotary_percent:g} of head size "
                f"{model.head_dim} is {rotated}; choose a rotary_percent of {even / model.head_dim:g} or another head "
                "size."
            )
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    if model.use_rope_scaling and high <= low:
        yield (
            f"rope_scaling_high_freq_factor={high:g} is not above rope_scaling_low_freq_factor={low:g}; choose more "
            f"than {low:g}."
        )


def tensor_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """What keeps a model of this shape from being shared by that many tensor ranks, one sentence each."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    if model.num_attention_heads % tensor:
        yield _does_not_divide("tensor_model_parallel_size", tensor, "num_attention_heads", model.num_attention_heads)
    if model.kv_heads != model.num_attention_heads and model.kv_heads % tensor and tensor % model.kv_heads:
        legal = [
            size
            for size in divisors(model.num_attention_heads)
            if not (model.kv_heads % size and size % model.kv_heads)
        ]
        yield (
            f"tensor_model_parallel_size={tensor} neither divides num_query_groups={model.kv_heads} nor is a multiple "
            f"of it; choose {one_of(legal)}."
        )
    if model.ffn_size % tensor:
        yield _does_not_divide("tensor_model_parallel_size", tensor, "ffn_hidden_size", model.ffn_size)
    if world_size % tensor:
        yield _does_not_divide("tensor_model_parallel_size", tensor, "the number of ranks", world_size)
    elif world_size % (tensor * (pipe := config.parallel.pipeline_model_parallel_size)):
        yield (
            f"tensor_model_parallel_size x pipeline_model_parallel_size = {tensor} x {pipe} = {tensor * pipe} does not "
            f"divide the number of ranks={world_size}; choose a pipeline_model_parallel_size of "
            f"{one_of(divisors(world_size // tensor))}."
        )
    elif world_size % (shared := config.parallel.model_parallel_size):
        context = config.parallel.context_parallel_size
        yield (
            f"tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = {tensor} x {pipe} x "
            f"{context} = {shared} does not divide the number of ranks={world_size}; choose a context_parallel_size "
            f"of {one_of(divisors(world_size // (tensor * pipe)))}."
        )


def _lengths(config: RunConfig, world_size: int) -> Iterator[str]:
    length, tensor = config.data.seq_length, config.parallel.tensor_model_parallel_size
    longest = config.model.max_position_embeddings
    if longest is not None and length > longest:
        yield (
            f"seq_length={length} is longer than max_position_embeddings={longest}; shorten the one to {longest} or "
            f"raise the other to {length}."
        )
    if config.parallel.sequence_parallel and length % tensor:
        yield (
            f"--sequence-parallel splits seq_length={length} over tensor_model_parallel_size={tensor}, which does not "
            f"divide it; choose a seq_length of {_multiples_around(length, tensor)}."
        )


def _context(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, model, length = config.parallel, config.model, config.data.seq_length
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if context == 1:
        return
    chunks = 2 * context
    if length % chunks:
        yield (
            f"context_parallel_size={context} cuts seq_length={length} into 2 x {context} chunks, which do not divide "
            f"it; choose a seq_length of {_multiples_around(length, chunks)}."
        )
    elif parallel.sequence_parallel and length % tensor == 0 and length // context % tensor:
        yield (
            f"--sequence-parallel splits what context_parallel_size={context} leaves of seq_length={length}, "
            f"{length // context} tokens, over tensor_model_parallel_size={tensor}, which does not divide it; choose a "
            f"seq_length of {_multiples_around(length, math.lcm(chunks, context * tensor))}."
        )
    if parallel.cp_comm_type == "p2p":
        if model.attention_dropout:
            yield (
                f"attention_dropout={model.attention_dropout:g} does not go with cp_comm_type=p2p, which has no "
                "probabilities to drop; choose --attention-dropout 0, or --cp-comm-type a2a."
            )
        return
    if model.num_attention_heads % tensor:
        return
    heads, groups = model.num_attention_heads // tensor, max(1, model.kv_heads // tensor)
    if heads % context or (groups % context and context % groups):
        legal = [size for size in divisors(heads) if not (groups % size and size % groups)]
        yield (
            f"cp_comm_type=a2a shares {heads} query heads and {groups} key/value heads of a tensor rank out over "
            f"context_parallel_size={context} ranks, which do not divide them; choose {one_of(legal)}, or "
            "--cp-comm-type p2p."
        )


def _recompute(config: RunConfig, world_size: int) -> Iterator[str]:
    count, layers = config.training.recompute_num_layers, config.model.num_layers
    if config.training.recompute_granularity == "full" and count > layers:
        yield f"recompute_num_layers={count} is above num_layers={layers}; choose 1 to {layers}."


def _batch(config: RunConfig, world_size: int) -> Iterator[str]:
    training, model_size = config.training, config.parallel.model_parallel_size
    if world_size % model_size:
        return
    data_size = world_size // model_size
    unit = training.micro_batch_size * data_size
    batch, steps = training.batch_size(data_size), training.gradient_accumulation_steps
    sum_text = f"micro_batch_size x data size = {training.micro_batch_size} x {data_size} = {unit}"
    if batch % unit:
        yield f"global_batch_size={batch} is not a multiple of {sum_text}; choose {_multiples_around(batch, unit)}."
    elif steps is not None and batch != unit * steps:
        yield (
            f"global_batch_size={batch} contradicts gradient_accumulation_steps={steps}: micro_batch_size x data size "
            f"x steps = {training.micro_batch_size} x {data_size} x {steps} = {unit * steps}; leave one out, or give "
            f"gradient_accumulation_steps={batch // unit}."
        )
    if training.rampup_batch_size is None:
        return
    start, increment, _ = training.rampup_batch_size
    if start >= batch:
        yield (
            f"rampup_batch_size starts at {start}, which is not below global_batch_size={batch}; start lower or leave "
            "the ramp-up out."
        )
    elif (batch - start) % increment:
        yield (
            f"rampup_batch_size grows from {start} by {increment}, which does not reach global_batch_size={batch}; "
            f"choose an increment that divides {batch - start}."
        )
    for word, size in (("start", start), ("increment", increment)):
        if size % unit:
            yield (
                f"The {word} {size} of rampup_batch_size is not a multiple of {sum_text}; choose "
                f"{_multiples_around(size, unit)}."
            )


def _run_length(config: RunConfig, world_size: int) -> Iterator[str]:
    names = ("train_iters", "train_samples", "train_tokens", "train_epochs")
    given = [name for name in names if getattr(config.training, name) is not None]
    if len(given) != 1 and given != ["train_samples", "train_tokens"]:
        flags = one_of(f"--{name.replace('_', '-')}" for name in names)
        if given:
            values = " and ".join(f"{name}={getattr(config.training, name)}" for name in given)
            yield (
                f"The length of the run is given {len(given)} times, {values}; give one of {flags}, or samples and "
                "tokens, of which the shorter counts."
            )
        else:
            yield f"The length of the run is not given; give one of {flags}."


def _learning_rate(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"min_lr={optimizer.min_lr:g} is above lr={optimizer.lr:g}; give a min_lr of at most lr."
    if optimizer.lr_warmup_init > optimizer.lr:
        yield f"lr_warmup_init={optimizer.lr_warmup_init:g} is above lr={optimizer.lr:g}; give at most lr."
    in_iterations = [name for name in ("lr_decay_iters", "lr_warmup_iters") if getattr(optimizer, name)]
    in_samples = [name for name in ("lr_decay_samples", "lr_warmup_samples") if getattr(optimizer, name)]
    if in_iterations and in_samples:
        both = " and ".join(f"{name}={getattr(optimizer, name)}" for name in in_iterations + in_samples)
        yield f"Warm-up and decay are given in iterations and in samples ({both}); give both in one unit."
    lengths = [name for name in ("lr_warmup_iters", "lr_warmup_samples") if getattr(optimizer, name)]
    if lengths and optimizer.lr_warmup_fraction is not None:
        both = ", ".join(f"{name}={getattr(optimizer, name)}" for name in lengths)
        yield (
            f"The warm-up is given twice ({both}, lr_warmup_fraction={optimizer.lr_warmup_fraction:g}); "
            "give a length or a fraction."
        )
    for warmup, decay in (("lr_warmup_iters", "lr_decay_iters"), ("lr_warmup_samples", "lr_decay_samples")):
        first, last = getattr(optimizer, warmup), getattr(optimizer, decay)
        if last is not None and first >= last:
            yield f"{warmup}={first} leaves nothing of {decay}={last}; give a warm-up below {last}."
    if optimizer.lr_decay_style == "vaswani":
        if in_samples:
            yield f"lr_decay_style=vaswani counts steps, but {in_samples[0]} is in samples; give --lr-warmup-iters."
        elif not optimizer.lr_warmup_iters and not optimizer.lr_warmup_fraction:
            yield "lr_decay_style=vaswani needs a warm-up; give --lr-warmup-iters (4000 in the paper)."


def _precision(config: RunConfig, world_size: int) -> Iterator[str]:
    precision = config.precision
    if precision.fp16 and precision.bf16:
        yield "--fp16 and --bf16 are both given; choose one."
    scale = precision.initial_loss_scale
    power = 2.0 ** round(math.log2(scale))
    if scale != power or scale < 1:
        yield f"initial_loss_scale={scale:g} is not a power of two of 1 or more; choose {max(power, 1):g}."
    elif precision.min_loss_scale > scale:
        yield (
            f"min_loss_scale={precision.min_loss_scale:g} is above initial_loss_scale={scale:g}; "
            f"choose at most {scale:g}."
        )
    if precision.min_loss_scale != int(precision.min_loss_scale):
        yield f"min_loss_scale={precision.min_loss_scale:g} is not whole; choose {math.ceil(precision.min_loss_scale)}."


def _checkpoint(config: RunConfig, world_size: int) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        if checkpoint.save_interval is not None:
            yield f"save_interval={checkpoint.save_interval} needs a folder; give --save DIR."
        if checkpoint.keep_last is not None:
            yield f"keep_last={checkpoint.keep_last} needs a folder; give --save DIR."
        if checkpoint.keep_every is not None:
            yield f"keep_every={checkpoint.keep_every} needs a folder; give --save DIR."
        if checkpoint.save_copy_to is not None:
            yield f"--save-copy-to {checkpoint.save_copy_to} copies what is saved; give --save DIR."
        if checkpoint.resume == "must":
            yield "--resume must needs the folder of the run to go on with; give --save DIR."
    elif checkpoint.keep_every is not None and checkpoint.keep_last is None:
        yield (
            f"keep_every={checkpoint.keep_every} says what to keep beside the newest, and all are kept; give "
            "--keep-last N too."
        )
    if checkpoint.load is None:
        if checkpoint.finetune and checkpoint.load_hf is None:
            yield "--finetune needs weights to start from; give --load DIR."
        if checkpoint.ckpt_step is not None and checkpoint.save is None:
            yield f"ckpt_step={checkpoint.ckpt_step} needs a folder of checkpoints; give --load DIR."
    elif checkpoint.load_hf is not None:
        yield f"load={checkpoint.load} and load_hf={checkpoint.load_hf} are two models to begin with; give one of them."
    elif checkpoint.loads_what_it_saves and checkpoint.finetune:
        yield (
            f"--finetune begins a new run with the weights of load={checkpoint.load}, which is the folder this run "
            "saves to; give another --save DIR."
        )
    if checkpoint.save_copy_to is not None and are_hidden(checkpoint.save_copy_to):
        yield (
            f"--save-copy-to {checkpoint.save_copy_to} is what logs and config.yaml show: its credentials are gone; "
            "give it again with them, or without, where the environment or a file of the service has them."
        )
    if checkpoint.overwrite and checkpoint.resume != "never":
        yield f"--overwrite empties the run folder, but --resume is {checkpoint.resume}; give --resume never with it."


def _lies_in(path: str, folder: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def _files(config: RunConfig, world_size: int) -> Iterator[str]:
    values = values_of(config)
    for name in ("save", "run_dir", "tensorboard_dir", "wandb_save_dir"):
        path = Path(values[name] or "").absolute()
        # os.path answers for names too long to be a file's too.
        nearest_there = next(place for place in (path, *path.parents) if os.path.exists(place))
        if not nearest_there.is_dir():
            yield f"{name}={values[name]} cannot be a folder, since {nearest_there} is a file; give another."
    saved, loaded = config.checkpoint.save, config.checkpoint.load
    if config.checkpoint.overwrite and saved and loaded and _lies_in(loaded, saved):
        yield f"--overwrite would empty save={saved}, where load={loaded} lies; give another --save DIR."
    if (path := config.parallel.deepspeed_config) and not os.path.isfile(path):
        yield f"deepspeed_config={path} is not a file; give the path of a DeepSpeed JSON."
    if (path := config.checkpoint.load) and not config.checkpoint.loads_what_it_saves and not os.path.isdir(path):
        yield f"load={path} is not a folder; give a folder of checkpoints."
    if config.model.vocab_size is None and config.data.tokenizer_type is None:
        yield "The size of the vocabulary is unknown; give --tokenizer-type with its files, or --vocab-size."
