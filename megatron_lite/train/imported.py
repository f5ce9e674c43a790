"""A checkpoint of weights alone, made of another project's: step 0 of no run, to begin runs with or to be asked."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_lite import log
from megatron_lite.checkpoint.foreign import Link, Source, pieces_to_come
from megatron_lite.checkpoint.save import save
from megatron_lite.config import sources
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data import tokenizer_files
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.errors import ConfigError, TokenizerError
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh


@contextlib.contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, which must be empty or not there, when the block ends well.

    After an error nothing is left. Raises ConfigError for a folder that holds something, and OSError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not an empty folder; give another name")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_imported(
    source: Source,
    links: Mapping[str, Sequence[Link]],
    config: RunConfig,
    into: Path,
    target: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and the tokenizer that `config` names as a folder of checkpoints, one tensor in memory at a time.

    They go into the folder `into`, which is to become `target`. Weights keep their dtype unless one is given. Raises
    CheckpointError, and CheckpointNotSaved for a full disk.
    """
    pieces = pieces_to_come(source, links, dtype)
    config, fingerprint = _with_tokenizer(config, into, target)
    first = pieces[0].tensor.dtype
    config = dataclasses.replace(
        config, precision=PrecisionConfig(bf16=first == torch.bfloat16, fp16=first == torch.float16)
    )
    mesh = ProcessMesh(MeshShape(), 0)
    made_with = {name: str(version) for name, version in versions().items()}
    save(
        into,
        0,
        pieces,
        {"facts": {"tokenizer": fingerprint}, "imported_from": source.name},
        mesh,
        layout=f"{mesh.shape},zero=0",
        config=sources.plain(config),
        versions=made_with,
    )


def _with_tokenizer(config: RunConfig, into: Path, target: Path) -> tuple[RunConfig, str | None]:
    """`config` with its tokenizer read from a copy in what `into` becomes, and the tokenizer's fingerprint."""
    data = config.data
    if data.tokenizer_type is not None:
        try:
            fingerprint = build_tokenizer(data).fingerprint
            tokenizer_files.copy_tokenizer(data, into / tokenizer_files.FOLDER)
            named = tokenizer_files.FILES_IN_A_COPY.get(data.tokenizer_type, {})
            there = {field: str(target / tokenizer_files.FOLDER / name) for field, name in named.items()}
            return dataclasses.replace(config, data=dataclasses.replace(data, **there)), fingerprint
        except TokenizerError as error:
            log.warn(f"the checkpoint has no tokenizer: {error}")
    else:
        log.warn("no tokenizer was found: the checkpoint has none, and tools that need one are to be told of it")
    blank = dict.fromkeys(tokenizer_files.FILE_FIELDS)
    return dataclasses.replace(config, data=dataclasses.replace(data, **blank)), None
