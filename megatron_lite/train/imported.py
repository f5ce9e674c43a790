"""A checkpoint of weights alone, made of another project's: step 0 of no run, to begin runs with or to be asked."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_lite import log
from megatron_lite.checkpoint.foreign import Link, Source, pieces_to_come
from megatron_lite.checkpoint.save import save
from megatron_lite.checkpoint.store import sync_folder
from megatron_lite.config import sources
from megatron_lite.config.precision import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data import tokenizer_files
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError, TokenizerError
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

CONFIG = "config.yaml"
"""What begins a run with a checkpoint of weights alone: their model and tokenizer."""


@contextlib.contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, which must be empty or not there, when the block ends well.

    What is in it is on disk by then. After an error nothing is left; what a kill left is taken away when the next one
    is to become `target`. Raises ConfigError for a folder that holds something or cannot be replaced, and OSError.
    """
    place = Path(os.path.realpath(target))
    if place == Path.cwd():
        raise ConfigError(f"{target} is the folder that you are in, which cannot be replaced; give the name of another")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{target} is there already and not an empty folder; give another name")
    with contextlib.ExitStack() as held:
        temporary = _locked_beside(place, held)
        try:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    with open(Path(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(folder))
            os.rename(temporary, place)
            sync_folder(place.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _locked_beside(place: Path, held: contextlib.ExitStack) -> Path:
    """A new folder beside `place`, locked while `held`; those of processes that are no more are gone."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as sweeping:
        # Otherwise a folder might be swept between its making and its lock.
        if _lock(place.parent, sweeping):
            for left in place.parent.iterdir():
                is_ours = re.fullmatch(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.tmp", left.name)
                if is_ours and left.is_dir() and not left.is_symlink():
                    with contextlib.ExitStack() as dead:
                        if _lock(left, dead, fcntl.LOCK_NB):
                            shutil.rmtree(left, ignore_errors=True)
                            log.note(f"took away {left}, left by a process that was killed")
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        _lock(temporary, held)
    return temporary


def _lock(folder: Path, held: contextlib.ExitStack, flags: int = 0) -> bool:
    """Whether a folder is now this process's until `held` ends: some file systems lock none."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
    except OSError:
        return False
    return True


def how_to_begin(target: Path) -> str:
    """The command that begins a run with what was imported."""
    folder, config = (shlex.quote(str(path)) for path in (target, target / CONFIG))
    return (
        f"python pretrain_gpt.py --config {config} --load {folder} --finetune\n"
        "(with data, by --data-path or the like; a length, by --train-iters; and another --save folder)"
    )


def write_imported(
    source: Source,
    links: Mapping[str, Sequence[Link]],
    config: RunConfig,
    into: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> None:
    """Write weights and the tokenizer that `config` names as a folder of checkpoints, one tensor in memory at a time.

    They go into the folder `into`, which is to become `target`. Weights keep their dtype unless one is given; `family`
    is what they are exported as again. Raises CheckpointError, and CheckpointNotSaved for a full disk.
    """
    pieces = pieces_to_come(source, links, dtype)
    config, tokenizer = _with_tokenizer(config, into, target)
    beginning = _beginning(config, tokenizer, source.name)
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
        {"facts": {"tokenizer": tokenizer and tokenizer.fingerprint, "family": family}, "imported_from": source.name},
        mesh,
        layout=f"{mesh.shape},zero=0",
        config=sources.plain(config),
        versions=made_with,
    )
    (into / CONFIG).write_text(beginning, encoding="utf-8")


def _beginning(config: RunConfig, tokenizer: Tokenizer | None, source: str) -> str:
    """The text of a config.yaml with model and tokenizer; as many token ids as the larger of the two has."""
    sections = sources.plain(config)
    model, data = sections["model"], sections["data"]
    if tokenizer is not None:
        model["vocab_size"] = max(model["vocab_size"], tokenizer.vocab_size)
    named = {name: data[name] for name in ("seq_length", *tokenizer_files.FILE_FIELDS) if data[name] is not None}
    head = f"# The model of {source!r}, imported in {str(Path.cwd())!r}, where relative paths begin.\n"
    return head + sources.dump_sections({"model": model, "data": named})


def _with_tokenizer(config: RunConfig, into: Path, target: Path) -> tuple[RunConfig, Tokenizer | None]:
    """`config` with its tokenizer read from a copy in what `into` becomes, and that tokenizer."""
    data = config.data
    if data.tokenizer_type is not None:
        try:
            tokenizer = build_tokenizer(data)
            tokenizer_files.copy_tokenizer(data, into / tokenizer_files.FOLDER)
            named = tokenizer_files.FILES_IN_A_COPY.get(data.tokenizer_type, {})
            there = {field: str(target / tokenizer_files.FOLDER / name) for field, name in named.items()}
            return dataclasses.replace(config, data=dataclasses.replace(data, **there)), tokenizer
        except TokenizerError as error:
            log.warn(f"the checkpoint has no tokenizer: {error}")
    else:
        log.warn("no tokenizer was found: the checkpoint has none, and tools that need one are to be told of it")
    blank = dict.fromkeys(tokenizer_files.FILE_FIELDS)
    return dataclasses.replace(config, data=dataclasses.replace(data, **blank)), None
