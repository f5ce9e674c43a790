"""A run put together: ranks, data, model, engine, out of a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_lite import log
from megatron_lite.checkpoint import ranks
from megatron_lite.config import check
from megatron_lite.config.run import RunConfig
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.stream import SampleStream, build_stream
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError, MegatronLiteError, UserError
from megatron_lite.kernels import extension
from megatron_lite.model.apex import nvidia_apex_norms
from megatron_lite.model.gpt import GPT
from megatron_lite.model.init import initial_value, initialize
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.groups import default_rules, parameter_groups
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute
from megatron_lite.train import deepspeed_config
from megatron_lite.train.engine import Engine, ReplicaEngine, ZeroEngine, build_partitioned

T = TypeVar("T")


def start_ranks(me: launch.Launch, *, tensor: int, timeout_minutes: float) -> ProcessMesh:
    """The live mesh of all ranks that were launched; the data size is what the tensor size leaves."""
    shape = MeshShape.of_world(me.world_size, tensor=tensor)
    device = launch.start(me, timeout_minutes)
    return ProcessMesh.create(shape, device, timedelta(minutes=timeout_minutes))


def together(mesh: ProcessMesh, action: Callable[[], T]) -> T:
    """`action()`; an error on one rank is raised on all of them, so that none waits.

    It is a UserError where each rank that failed knows why.
    """
    done: list[T] = []
    with alike():
        try:
            ranks.together(mesh, lambda: done.append(action()))
        except ranks.RankFailures as failures:
            texts = {failure.text for failure in failures.failures}
            everywhere = len(texts) == 1 and len(failures.failures) == mesh.world_size
            kind = UserError if all(failure.is_explained for failure in failures.failures) else MegatronLiteError
            # What nobody foresaw is told where it happened, with its traceback.
            unforeseen = failures.__cause__ if not isinstance(failures.__cause__, _EXPLAINED) else None
            raise unforeseen or kind(texts.pop() if everywhere else str(failures)) from None
    return done[0]


_EXPLAINED = (MegatronLiteError, OSError, type(None))


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What every rank does alike: an error of ours in here is raised on all of them, and rank 0 tells it."""
    try:
        yield
    except MegatronLiteError as error:
        error.on_all_ranks = True
        raise


def prepare_kernels(config: RunConfig, mesh: ProcessMesh) -> None:
    """Find or compile the kernels of this rank's device before anything waits for them, and say what they are.

    Raises UserError on all ranks where one lacks what --require-native-kernels or --norm-backend apex asks for.
    """
    device, kernels = mesh.device.type, config.kernels

    def prepare() -> None:
        if kernels.require_native_kernels:
            extension.require_native(device)
        else:
            extension.load(device)
        if kernels.norm_backend == "apex":
            nvidia_apex_norms(device)

    together(mesh, prepare)
    backends = f"--norm-backend {kernels.norm_backend}, --attention-backend {kernels.attention_backend}"
    log.note(f"kernels: {extension.summary(device)}; {backends}")


def build_model(config: RunConfig, mesh: ProcessMesh, vocab_size: int) -> GPT:
    """The model of this rank, whole, in fp32 on the mesh's device, its weights drawn from the seed."""
    model = _empty_model(config, mesh, vocab_size)
    initialize(model, config.model, config.training.seed)
    return model


def build_model_to_train(config: RunConfig, mesh: ProcessMesh, vocab_size: int) -> GPT:
    """The same model for an engine: under ZeRO 3 over several data ranks no rank ever holds all of it."""
    if config.effective_zero_stage < 3 or mesh.size("data") == 1:
        return build_model(config, mesh, vocab_size)
    return build_partitioned(
        lambda: _empty_model(config, mesh, vocab_size),
        lambda name, layout: initial_value(name, layout, config.model, config.training.seed),
        mesh,
        deepspeed_config.build(config, mesh.size("data")),
    )


def _empty_model(config: RunConfig, mesh: ProcessMesh, vocab_size: int) -> GPT:
    return GPT(
        config.model,
        mesh,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        kernels=config.kernels,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=Recompute(
            config.training.recompute_granularity,
            config.training.recompute_method,
            config.training.recompute_num_layers,
        ),
        device=mesh.device,
    )


def build_engine(config: RunConfig, model: GPT, mesh: ProcessMesh) -> Engine:
    """The engine of the configured ZeRO stage, its optimizer over this rank's parameters."""
    problems = check.precision_problems(config.precision.dtype, mesh.device.type, has_fp16=mesh.device.type != "cpu")
    if problems:
        with alike():
            raise ConfigError(problems)
    groups = parameter_groups(model.named_parameters(), default_rules(config.optimizer))
    optimizer = build_optimizer(config.optimizer, groups)
    names = config.optimizer.slots
    stage = config.effective_zero_stage
    if stage == 0:
        return ReplicaEngine(model, mesh, optimizer, names, config.optimizer.clip_grad)
    if stage != config.parallel.zero_stage:
        log.warn(
            f"ZeRO {config.parallel.zero_stage} in {config.precision.dtype} runs as ZeRO {stage}: "
            f"16-bit weights need fp32 masters, which ZeRO keeps"
        )
    return ZeroEngine(model, mesh, optimizer, names, deepspeed_config.build(config, mesh.size("data")))


def open_stream(
    config: RunConfig, split: str, vocab_size: int, tokenizer: Tokenizer | None = None, *, scan: bool = True
) -> SampleStream:
    """The samples of "train", "valid" or "test", made with that tokenizer; with `scan` their ids are looked through
    for any beyond the vocabulary, which one rank can do for all."""
    stream = build_stream(
        config.data,
        seed=config.training.seed,
        split=split,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        skip_samples=config.training.skip_samples if split == "train" else (),
    )
    if scan:
        stream.check_vocabulary(vocab_size)
    return stream


def open_loader(config: RunConfig, stream: SampleStream, mesh: ProcessMesh, vocab_size: int) -> BatchLoader:
    """The micro-batches of this data rank out of `stream`."""
    return BatchLoader(
        stream,
        data_rank=mesh.rank("data"),
        data_size=mesh.size("data"),
        micro_batch_size=config.training.micro_batch_size,
        vocab_size=vocab_size,
        num_workers=config.data.num_workers,
    )


def close_ranks() -> None:
    """End the process group, once all ranks are here."""
    if dist.is_initialized():
        dist.destroy_process_group()
