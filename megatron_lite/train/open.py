"""A trained model opened for evaluation or generation, at whatever layout it was saved in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from megatron_lite.checkpoint.find import find
from megatron_lite.checkpoint.load import load
from megatron_lite.checkpoint.manifest import Manifest, read_manifest
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import CheckpointError
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel import launch
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.engine import DTYPES


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
    *,
    ckpt_step: int | None = None,
    tensor_size: int | None = None,
    dtype: str | None = None,
    overrides: sources.Overrides | None = None,
) -> OpenedModel:
    """The model of a checkpoint of any layout, at `tensor_size` (default: all ranks launched).

    `dtype` is "fp32", "bf16" or "fp16"; default: the precision it was trained in. `overrides` replaces
    fields of the checkpoint's configuration, such as the tokenizer's path. Raises CheckpointError.
    """
    me = launch.Launch.from_environment()
    mesh = build.start_ranks(me, tensor=tensor_size or me.world_size, timeout_minutes=10)
    folder = find(load_dir, mesh, ckpt_step, only="weight/")
    if folder is None:
        raise CheckpointError(f"{load_dir} holds no complete checkpoint; give the --save folder of a run")
    manifest = read_manifest(folder)
    config = sources.from_plain(manifest.config, str(folder))
    if overrides:
        config = sources.override(config, overrides)
    tokenizer = None
    if config.data.tokenizer_type:
        tokenizer = build_tokenizer(config.data)
    vocab_size = config.model.vocab_size
    target = DTYPES[dtype or config.precision.dtype]
    model = build.build_model(config, mesh, vocab_size)
    load(folder, weight_pieces(model), mesh, only="weight/")
    model.to(target)
    model.eval()
    return OpenedModel(model, config, mesh, tokenizer, manifest, manifest.step)


def weight_pieces(model: GPT) -> list[Piece]:
    """The fp32 weights of a model without an engine, for loading weights alone."""
    return [
        Piece(
            f"weight/{name}",
            parameter.mesh_layout.global_shape,
            part.global_start,
            parameter.detach().view(-1)[part.flat_start : part.flat_start + math.prod(part.shape)].view(part.shape),
            parameter.mesh_layout.is_owner,
        )
        for name, parameter in model.named_parameters()
        for part in parameter.mesh_layout.fragments()
    ]
