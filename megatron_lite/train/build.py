"""A run put together: ranks, data, model, engine, out of a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from megatron_lite import log
from megatron_lite.checkpoint import ranks
from megatron_lite.config import check
from megatron_lite.config.run import RunConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.length_curriculum import LengthCurriculum
from megatron_lite.data.loader import BatchLoader, BlankStream
from megatron_lite.data.micro_batch import Assembly
from megatron_lite.data.stream import SampleStream
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError, MegatronLiteError, UserError
from megatron_lite.kernels import extension
from megatron_lite.model.apex import nvidia_apex_norms
from megatron_lite.model.gpt import GPT, StageModule
from megatron_lite.model.init import initial_value, initialize
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.groups import default_rules, parameter_groups
from megatron_lite.parallel import launch
from megatron_lite.parallel.mesh_shape import REPLICAS, MeshShape
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.parallel.process_mesh import Exchange, ProcessMesh
from megatron_lite.parallel.recompute import Recompute
from megatron_lite.plan.parameters import parameter_shapes
from megatron_lite.plan.stages import plan_stages
from megatron_lite.train import deepspeed_config
from megatron_lite.train.backward import SharedWeight
from megatron_lite.train.engine import ZeroEngine, build_partitioned
from megatron_lite.train.engine_interface import DTYPES, Engine
from megatron_lite.train.replica_engine import ReplicaEngine

if TYPE_CHECKING:
    from megatron_lite.parallel.pipeline.runner import Pipeline

T = TypeVar("T")


def start_ranks(
    me: launch.Launch,
    *,
    tensor: int,
    pipe: int = 1,
    context: int = 1,
    timeout_minutes: float,
    store=None,
    before: Callable[[Exchange], None] = lambda _: None,
) -> ProcessMesh:
    """The live mesh of all ranks that were launched; the data size is what the other sizes leave.

    `store` is that of `launch.open_store`, if it is open already. `before` may speak to all ranks when there is no mesh
    yet.
    """
    shape = MeshShape.of_world(me.world_size, tensor=tensor, pipe=pipe, context=context)
    device = launch.start(me, timeout_minutes, store)
    before(Exchange(me.rank, me.world_size, dist.group.WORLD))
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
            kind = UserError if failures.is_explained else MegatronLiteError
            # What nobody foresaw is told where it happened, with its traceback.
            raise failures.unforeseen or kind(texts.pop() if everywhere else str(failures)) from None
    return done[0]


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
    """The same model for an engine: under ZeRO 3 over several replicas no rank ever holds all of it."""
    if config.effective_zero_stage < 3 or mesh.size(*REPLICAS) == 1:
        return build_model(config, mesh, vocab_size)
    return build_partitioned(
        lambda: _empty_model(config, mesh, vocab_size),
        lambda name, layout: initial_value(name, layout, config.model, config.training.seed),
        mesh,
        deepspeed_config.build(config, mesh.size("data")),
    )


def build_pipeline(config: RunConfig, model: GPT, mesh: ProcessMesh) -> Pipeline | None:
    """The pipeline of this rank's stages; None where one rank holds all layers."""
    if mesh.size("pipe") == 1:
        return None
    from megatron_lite.parallel.pipeline.runner import Pipeline

    batch, length = config.training.micro_batch_size, config.data.seq_length
    parts = mesh.size("context") * (mesh.size("tensor") if config.parallel.sequence_parallel else 1)
    return Pipeline(
        {stage.index: StageModule(model, stage, length) for stage in model.stages},
        pipeline_plan(config),
        mesh,
        batch_shape=(batch, length),
        hidden_shape=(length // parts, batch, config.model.hidden_size),
        dtype=DTYPES[config.precision.dtype],
    )


def _empty_model(config: RunConfig, mesh: ProcessMesh, vocab_size: int) -> GPT:
    return GPT(
        config.model,
        mesh,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        kernels=config.kernels,
        sequence_parallel=config.parallel.sequence_parallel,
        context_exchange=config.parallel.cp_comm_type,
        recompute=Recompute(
            config.training.recompute_granularity,
            config.training.recompute_method,
            config.training.recompute_num_layers,
        ),
        stages=plan_stages(config, vocab_size),
        placement=pipeline_plan(config).placement,
        device=mesh.device,
    )


def build_engine(config: RunConfig, model: GPT, mesh: ProcessMesh) -> Engine:
    """The engine of the configured ZeRO stage, its optimizer over this rank's parameters."""
    problems = check.precision_problems(config.precision.dtype, mesh.device.type, has_fp16=mesh.device.type != "cpu")
    if problems:
        with alike():
            raise ConfigError(problems)
    whole = parameter_shapes(config.model, vocab_size=model.vocabulary.vocab_size, seq_length=config.data.seq_length)
    groups = parameter_groups(
        model.named_parameters(), default_rules(config.optimizer), elsewhere=[shape.name for shape in whole]
    )
    optimizer = build_optimizer(config.optimizer, groups)
    names = config.optimizer.slots
    stage = config.effective_zero_stage
    shared = _shared_weight(config, model, mesh)
    overlaps = config.parallel.overlap_grad_reduce and mesh.size("pipe") == 1
    if config.parallel.overlap_grad_reduce and not overlaps:
        log.once("--overlap-grad-reduce has no effect in a pipeline, whose gradients are summed when its schedule ends")
    if stage == 0:
        return ReplicaEngine(
            model,
            mesh,
            optimizer,
            names,
            config.optimizer.clip_grad,
            shared,
            overlaps=overlaps,
            bucket_elements=config.parallel.ddp_bucket_size,
        )
    if stage != config.parallel.zero_stage:
        log.warn(
            f"ZeRO {config.parallel.zero_stage} in {config.precision.dtype} runs as ZeRO {stage}: "
            f"16-bit weights need fp32 masters, which ZeRO keeps"
        )
    return ZeroEngine(
        model,
        mesh,
        optimizer,
        names,
        deepspeed_config.build(config, mesh.size("data")),
        shared,
        overlap_elements=config.parallel.ddp_bucket_size if overlaps else None,
    )


def _shared_weight(config: RunConfig, model: GPT, mesh: ProcessMesh) -> SharedWeight | None:
    if mesh.size("pipe") == 1 or config.model.untie_embeddings_and_output_weights:
        return None
    # All ranks make the group, whether it is theirs or not.
    group = mesh.ends("pipe", *pipeline_plan(config).ends)
    return None if model.shared_weight is None else SharedWeight(model.shared_weight, group)


def open_stream(
    config: RunConfig,
    split: str,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    *,
    scan: bool = True,
    total_samples: int | None = None,
) -> SampleStream:
    """The samples of "train", "valid" or "test", made with that tokenizer, of a run of `total_samples`; with `scan`
    their ids are looked through for any beyond the vocabulary, which one rank can do for all."""
    stream = build_stream(
        config.data,
        seed=config.training.seed,
        split=split,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        skip_samples=config.training.skip_samples if split == "train" else (),
        total_samples=total_samples,
    )
    if scan:
        stream.check_vocabulary(vocab_size)
    return stream


def open_loader(
    config: RunConfig,
    stream: SampleStream,
    mesh: ProcessMesh,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    *,
    split: str = "train",
) -> BatchLoader:
    """The micro-batches of this data rank out of `stream`, that of `split`, whose text is `tokenizer`'s.

    In the middle of a pipeline they are empty, unless its layers ask where documents begin. A curriculum and processes
    that read ahead are for "train" alone. Raises ConfigError where documents are to end in a token that the tokenizer
    does not have.
    """
    data = config.data
    at_end = mesh.size("pipe") == 1 or mesh.rank("pipe") in pipeline_plan(config).ends
    reads = at_end or data.reset_attention_mask or data.reset_position_ids
    eod = tokenizer.eod if data.eod_mask_loss and tokenizer is not None else None
    if data.eod_mask_loss and eod is None:
        with alike():
            raise ConfigError(
                "--eod-mask-loss leaves out what follows an end-of-document token, and "
                f"{data.tokenizer_type or 'a run without a tokenizer'} has none; leave it out, or name a tokenizer "
                "that has one."
            )
    curriculum = LengthCurriculum.of(data) if split == "train" else None
    return BatchLoader(
        stream if reads else BlankStream(data.seq_length),
        data_rank=mesh.rank("data"),
        data_size=mesh.size("data"),
        micro_batch_size=config.training.micro_batch_size,
        vocab_size=vocab_size,
        num_workers=data.num_workers if reads and split == "train" else 0,
        assembly=Assembly(data.reset_attention_mask, data.reset_position_ids, eod, curriculum),
        pin_memory=mesh.device.type == "cuda",
    )


def close_ranks() -> None:
    """End the process group, once all ranks are here."""
    if dist.is_initialized():
        dist.destroy_process_group()
