#!/usr/bin/env python
"""Turn a GPT checkpoint of Megatron-LM or Megatron-DeepSpeed into one of ours. Those files are pickles.

python tools/import_megatron.py --load checkpoints/gpt --save runs/gpt --trusted \
    --tokenizer-type GPT2BPETokenizer --vocab-file encoder.json --merge-file vocab.bpe
"""

from __future__ import annotations

import dataclasses
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.tokenizer import TokenizerFiles, TokenizerType
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.parallel.door import exit_code_of
from megatron_lite.parallel.launch import Launch

WARNING = (
    "Megatron's checkpoints are pickles, and a pickle can run what its maker likes. Only tensors and plain values are "
    "taken of these, by torch.load(weights_only=True), and a file with anything else is refused; still, import only "
    "what you trust, and once: the result is safetensors."
)
_RANK = re.compile(r"mp_rank_([0-9]{2,5})(?:_([0-9]{3,5}))?(_model_states\.pt)?")
_CHECKPOINT_VERSION = 3.0
"""Since which queries, keys and values are joined group by group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions(TokenizerFiles):
    """What is read and what is written."""

    load: str
    """Folder with latest_checkpointed_iteration.txt (Megatron-LM) or latest (Megatron-DeepSpeed), or one below it that
    holds mp_rank_..."""
    save: str
    """Folder of checkpoints to write, new or empty."""
    trusted: bool = False
    """The files are pickles, and you know where they come from."""
    vocab_size: int | None = None
    """Number of token ids without padding; default: the tokenizer's, or what the checkpoint says."""
    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer to go along; default: none."""


class _Inert:
    """What stands for a class that a pickle names: made of anything, holding nothing, doing nothing."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Settings:
    """What stands for argparse.Namespace: attributes, and nothing else."""


_STAND_INS = [
    (_Settings, "argparse.Namespace"),
    *(
        (_Inert, name)
        for name in (
            *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("_reconstruct", "scalar")),
            "numpy.ndarray",
            "numpy.dtype",
            "_io.BytesIO",
            "signal.Signals",
            "pathlib.PosixPath",
            "megatron.core.enums.ModelType",
            "megatron.core.transformer.enums.AttnBackend",
            "megatron.core.transformer.enums.AttnMaskType",
            "megatron.core.rerun_state_machine.RerunMode",
            "megatron.core.rerun_state_machine.RerunState",
            "megatron.model.enums.PositionEmbeddingType",
            "megatron.model.enums.ModelType",
            "megatron.enums.PositionEmbeddingType",
        )
    ),
]
"""Classes that Megatron's files name beside tensors; none of them is ever imported or made."""


def _load(path: Path) -> Mapping[str, Any]:
    """A file's content, by weights alone; tensors of a zip archive stay on disk until they are read."""
    import torch

    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    # torch raises several kinds for what it refuses, and whatever a damaged file leads to.
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} is refused: {reason}, which is neither a tensor nor a plain value. If you trust it, save its "
            "'model' and 'args' alone by the program that wrote it, and import that"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no dictionary")
    return content


def _folder(root: Path) -> Path:
    """The folder of the newest step, by the file that names it, or `root` itself."""
    for name, form in (("latest_checkpointed_iteration.txt", "iter_{:07d}"), ("latest", None)):
        if (root / name).is_file():
            said = (root / name).read_text(errors="replace").strip()
            if form and said.isdecimal():
                said = form.format(int(said))
            if not re.fullmatch(r"[A-Za-z0-9_]{1,80}", said):
                raise CheckpointError(f"{root / name} says {said[:80]!r}, which is no name of a folder")
            return root / said
    return root


def _files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(pipe rank, tensor rank, file) of every file of weights."""
    for path in sorted(folder.glob("mp_rank_*")):
        if match := _RANK.fullmatch(path.name):
            tensor, pipe = int(match[1]), int(match[2] or 0)
            names = ("model_optim_rng.pt", "model_rng.pt")
            found = [path] if match[3] else [path / name for name in names if (path / name).is_file()]
            if found and found[0].resolve().is_relative_to(folder.resolve()):
                yield pipe, tensor, found[0]


def _import(options: ImportOptions) -> None:
    from megatron_lite.checkpoint.megatron import Chunk, MegatronWeights, flatten
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.data.tokenizer import build_tokenizer
    from megatron_lite.train.imported import arriving, how_to_begin, write_imported

    folder, target = _folder(Path(options.load)), Path(options.save)
    files = list(_files(folder))
    if not files:
        raise CheckpointError(
            f"{folder} holds no mp_rank_XX[_YYY]/model_optim_rng.pt and no mp_rank_XX_model_states.pt"
        )
    names = [field.name for field in dataclasses.fields(TokenizerFiles)]
    data = {name: getattr(options, name) for name in (*names, "tokenizer_type")}
    config = sources.override(RunConfig(), {"data": data})
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer_type is not None:
        vocab_size = build_tokenizer(config.data).vocab_size
    chunks, settings = {}, None
    for pipe, tensor, path in files:
        content = _load(path)
        if settings is None:
            settings = _settings(content, path)
        for virtual, tree in enumerate(_models(content, path)):
            chunks[Chunk(pipe, tensor, virtual)] = dict(flatten(tree))
    weights = MegatronWeights(str(folder), chunks, settings, vocab_size)
    fields = {name: getattr(weights.model, name) for name in (f.name for f in dataclasses.fields(weights.model))}
    length = {"seq_length": min(config.data.seq_length, weights.model.max_position_embeddings)}
    config = sources.override(config, {"model": fields, "data": length})
    with arriving(target) as temporary:
        write_imported(weights, weights.links, config, temporary, target)
    print(f"{target} holds {len(weights.links)} weights of {folder}; begin a run with them:\n{how_to_begin(target)}")


def _settings(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    version = content.get("checkpoint_version", _CHECKPOINT_VERSION)
    if version != _CHECKPOINT_VERSION:
        raise CheckpointError(f"{path} has checkpoint_version {version!r}; only {_CHECKPOINT_VERSION} is read")
    if not isinstance(settings := content.get("args"), _Settings):
        raise CheckpointError(f"{path} holds no 'args', the settings of the model")
    return vars(settings)


def _models(content: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """The state dictionaries of a file, one a stage."""
    found = [content[key] for key in ("model", "module") if isinstance(content.get(key), Mapping)][:1]
    while isinstance(more := content.get(f"model{len(found)}"), Mapping):
        found.append(more)
    if not found:
        raise CheckpointError(f"{path} holds no 'model'")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""

    def convert(me: Launch) -> None:
        if me.world_size > 1:
            raise ConfigError("import_megatron.py works in one process; start it by python.")
        options = read(
            ImportOptions,
            sys.argv[1:] if argv is None else argv,
            prog="import_megatron.py",
            description=f"Turn a GPT checkpoint of Megatron-LM or Megatron-DeepSpeed into one of ours. {WARNING}",
        )
        log.warn(WARNING)
        if not options.trusted:
            raise ConfigError("Say that you trust the files by --trusted.")
        try:
            _import(options)
        except OSError as error:
            raise ConfigError(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}.") from None

    return exit_code_of(convert)


if __name__ == "__main__":
    sys.exit(main())
