"""What a configuration comes to, before anything is started. No torch: it answers at once."""

from __future__ import annotations

from megatron_lite import log
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.vocabulary import resolve_vocabulary
from megatron_lite.optim.schedule import schedule
from megatron_lite.plan.memory import Moment, peak
from megatron_lite.plan.report import dry_run_report
from megatron_lite.train import deepspeed_config
from megatron_lite.train.batch_plan import BatchPlan, samples_of_run


def dry_run(config: RunConfig, world_size: int, device_type: str) -> list[str]:
    """The lines of `--dry-run`: the resolved config, then batch, parameters, compute, memory of a rank.

    `device_type`, "cpu" or "cuda", is what ranks are planned to run on.
    Raises what a run would for data or a tokenizer that cannot be opened.
    """
    tokenizer, vocab_size = resolve_vocabulary(config)
    data_size = world_size // config.parallel.model_parallel_size
    samples_per_epoch = available = None
    if config.data.mock_data or config.data.data_path or config.data.train_data_path:
        stream = build_stream(
            config.data,
            seed=config.training.seed,
            split="train",
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            skip_samples=config.training.skip_samples,
            total_samples=samples_of_run(config.training, data_size, config.data.seq_length),
        )
        samples_per_epoch, available = stream.samples_per_epoch, stream.ends_after
    plan = BatchPlan.of(config.training, data_size, config.data.seq_length, samples_per_epoch, available)
    config = plan.resolve(config, vocab_size)
    curve = schedule(config.optimizer, plan.total_iterations, plan.total_samples, config.model.hidden_size)
    if shortfall := curve.shortfall(plan.total_iterations, plan.total_samples):
        log.warn(shortfall)
    report = dry_run_report(
        config,
        world_size,
        vocab_size,
        batch_lines=plan.lines(),
        total_samples=plan.total_samples,
        samples_per_epoch=samples_per_epoch,
        device_type=device_type,
        reduce_bucket_size=_bucket_elements(config, data_size),
    )
    return ["# the resolved config", *sources.dump(config).splitlines(), "", *report]


def planned_peak(config: RunConfig, data_size: int, device_type: str) -> Moment:
    """The predicted memory peak of a rank of a resolved configuration."""
    assert config.model.vocab_size is not None, "a resolved configuration states its vocabulary"
    return peak(
        config,
        data_size=data_size,
        vocab_size=config.model.vocab_size,
        device_type=device_type,
        reduce_bucket_size=_bucket_elements(config, data_size),
    )


def _bucket_elements(config: RunConfig, data_size: int) -> int:
    """DeepSpeed's reduction bucket, which a user's file may set."""
    zero = deepspeed_config.build(config, data_size)["zero_optimization"]
    return int(zero["reduce_bucket_size"])
