"""A trained model opened for evaluation or generation, at whatever layout it was saved in."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Set
from pathlib import Path

import torch

from megatron_lite import log
from megatron_lite.checkpoint.find import search
from megatron_lite.checkpoint.load import load
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.piece import Piece, pieces_of
from megatron_lite.config import check, sources
from megatron_lite.config.data import DataConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data import tokenizer_files
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import CheckpointDamaged, CheckpointError, ConfigError
from megatron_lite.model.gpt import GPT
from megatron_lite.model.init import initial_value
from megatron_lite.parallel import launch
from megatron_lite.parallel.pipeline import rules
from megatron_lite.parallel.pipeline.rules import pipeline_plan
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.stages import plan_stages
from megatron_lite.train import build, checkpoint_fit
from megatron_lite.train.engine_interface import DTYPES


@dataclasses.dataclass
class OpenedModel:
    """A model with weights out of a checkpoint, in evaluation mode, on this rank."""

    model: GPT
    config: RunConfig
    mesh: ProcessMesh
    tokenizer: Tokenizer | None
    manifest: Manifest
    step: int


def open_model(
    load_dir: str | Path,
    me: launch.Launch,
    store=None,
    *,
    ckpt_step: int | None = None,
    tensor_size: int | None = None,
    pipe_size: int = 1,
    timeout_minutes: float = 10.0,
    dtype: str | None = None,
    overrides: sources.Overrides | None = None,
) -> OpenedModel:
    """Start the ranks that were launched, of which this is `me`, and open a model on them, as `open_on` does.

    `store` is that of `door.among_ranks`; a collective may take `timeout_minutes`.

    `tensor_size` ranks share each of `pipe_size` stages of the model (default: all that are left). Raises what
    `open_on` does.
    """
    tensor = tensor_size or max(1, me.world_size // pipe_size)
    mesh = build.start_ranks(me, tensor=tensor, pipe=pipe_size, timeout_minutes=timeout_minutes, store=store)
    with build.alike():
        return open_on(mesh, load_dir, ckpt_step=ckpt_step, dtype=dtype, overrides=overrides)


def open_on(
    mesh: ProcessMesh,
    load_dir: str | Path,
    *,
    ckpt_step: int | None = None,
    dtype: str | None = None,
    overrides: sources.Overrides | None = None,
) -> OpenedModel:
    """The model of a checkpoint of any layout, on a live mesh. All ranks call.

    `dtype` is "fp32", "bf16" or "fp16"; default: the precision of training, but fp32 on a CPU, where
    16-bit arithmetic is slow. `overrides` replaces fields of the checkpoint's configuration; the model
    grows by the ids of special tokens they add. The tokenizer is the copy beside the checkpoint, else
    the files that training read, unless `overrides` names another.

    Weights are rounded to `dtype` as they are read, chunk by chunk, so a rank needs memory for its part of
    the model alone. Raises CheckpointError, and UserError for a configuration or tokenizer that does not
    fit, on all ranks alike.
    """
    try:
        return _open(mesh, load_dir, ckpt_step, dtype, overrides or {}, values=False)
    except CheckpointDamaged as error:
        log.warn(str(error))
    return _open(mesh, load_dir, ckpt_step, dtype, overrides or {}, values=True)


def _open(
    mesh: ProcessMesh,
    load_dir: str | Path,
    ckpt_step: int | None,
    dtype: str | None,
    overrides: sources.Overrides,
    *,
    values: bool,
) -> OpenedModel:
    """As `open_on`, the newest checkpoint with its values checked beforehand, or by the load alone."""
    found = search(load_dir, mesh, ckpt_step, only="weight/", values=values)
    if found is None:
        raise CheckpointError(f"{load_dir} holds no complete checkpoint; give the --save folder of a run")
    folder, manifest = found
    config, tokenizer = build.together(mesh, lambda: _read(folder, manifest, mesh, overrides))
    model = GPT(
        config.model,
        mesh,
        vocab_size=config.model.vocab_size,
        seq_length=config.data.seq_length,
        sequence_parallel=config.parallel.sequence_parallel,
        stages=plan_stages(config, config.model.vocab_size),
        placement=pipeline_plan(config).placement,
        device=mesh.device,
        dtype=_dtype(dtype, config.precision.dtype, mesh.device),
    )
    rows = checkpoint_fit.stored_rows(folder, manifest, model.rows, positions_may_grow=False)
    _fill_unstored(model, config, rows)
    pieces = checkpoint_fit.within_stored_rows(weight_pieces(model), rows)
    load(folder, pieces, mesh, only="weight/", cast=True, manifest=manifest)
    return OpenedModel(model.eval(), config, mesh, tokenizer, manifest, manifest.step)


def weight_pieces(model: GPT) -> list[Piece]:
    """The weights of a model without an engine, in its own dtype, for loading weights alone."""
    return [
        piece
        for name, parameter in model.named_parameters()
        for piece in pieces_of(f"weight/{name}", parameter.mesh_layout, parameter, owned=parameter.mesh_layout.is_owner)
    ]


def _read(
    folder: Path, manifest: Manifest, mesh: ProcessMesh, overrides: sources.Overrides
) -> tuple[RunConfig, Tokenizer | None]:
    """Configuration for this opening, and tokenizer."""
    stored = sources.from_plain(manifest.config, str(folder))
    config = sources.override(stored, overrides)
    parallel = ParallelConfig(
        tensor_model_parallel_size=mesh.size("tensor"),
        pipeline_model_parallel_size=mesh.size("pipe"),
        sequence_parallel=config.parallel.sequence_parallel,
    )
    config = dataclasses.replace(config, parallel=parallel)
    if problems := [*check.tensor_problems(config, mesh.world_size), *rules.stage_problems(config)]:
        raise ConfigError(problems)
    tokenizer = _open_tokenizer(
        folder, manifest, stored.data.special_tokens, config.data, overrides.get("data", {}).keys()
    )
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        config = sources.override(config, {"model": {"vocab_size": tokenizer.vocab_size}})
    return config, tokenizer


def _open_tokenizer(
    folder: Path, manifest: Manifest, special_tokens: tuple[str, ...], data: DataConfig, overridden: Set[str]
) -> Tokenizer | None:
    """The tokenizer of training, by the fingerprint in the checkpoint, with the special tokens of `data` added."""
    if data.tokenizer_type is None:
        return None
    data, added = dataclasses.replace(data, special_tokens=special_tokens), data.special_tokens
    fingerprint = manifest.state.get("facts", {}).get("tokenizer")
    if not overridden.isdisjoint(tokenizer_files.FILE_FIELDS):
        tokenizer = build_tokenizer(data)
        if fingerprint not in (None, tokenizer.fingerprint):
            log.warn(f"the {tokenizer.kind} asked for is not the tokenizer of training: its ids may mean other text")
    else:
        tokenizer = tokenizer_files.tokenizer_of_training(folder, data, fingerprint)
    tokenizer.add_special_tokens(added)
    return tokenizer


def _dtype(asked: str | None, trained: str, device: torch.device) -> torch.dtype:
    chosen = asked or ("fp32" if device.type == "cpu" else trained)
    if asked is None and chosen != trained:
        log.note(
            f"opened in {chosen}, not in {trained} as trained: 16-bit arithmetic is slow on a CPU (--dtype {trained})"
        )
    return DTYPES[chosen]


@torch.no_grad()
def _fill_unstored(model: GPT, config: RunConfig, stored_rows: Collection[str]) -> None:
    """Give rows that no checkpoint holds their values: the initial draw, and zero in padding."""
    for name, parameter in model.named_parameters():
        if name in stored_rows:
            parameter.copy_(initial_value(name, parameter.mesh_layout, config.model, config.training.seed))
        elif name in checkpoint_fit.VOCABULARY:
            parameter.zero_()
