#!/usr/bin/env python
"""Turn a Hugging Face folder into a checkpoint, or a checkpoint into a Hugging Face folder.

python tools/convert_checkpoint.py --load-hf models/llama --save runs/llama
python tools/convert_checkpoint.py --load runs/mine --save-hf exported/mine
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.data import DataConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.parallel.door import exit_code_of
from megatron_lite.parallel.launch import Launch

if TYPE_CHECKING:
    from megatron_lite.checkpoint.manifest import Manifest
    from megatron_lite.data.tokenizer_interface import Tokenizer

_HF_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What is read and what is written."""

    load_hf: str | None = None
    """Hugging Face folder to read: config.json, safetensors files, tokenizer."""
    save: str | None = None
    """With --load-hf: folder of checkpoints to write, new or empty."""
    load: str | None = None
    """Folder of a run's checkpoints (its --save folder), or of one checkpoint, to read."""
    ckpt_step: int | None = None
    """With --load: step to read; default: the newest complete one."""
    save_hf: str | None = None
    """With --load: Hugging Face folder to write, new or empty."""
    family: Literal["gpt2", "llama", "mistral", "qwen2", "qwen3"] | None = None
    """With --save-hf: model family to write it as; default: what it was imported as, or the first whose form it has."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of what is written; default: as stored, so that no bit changes."""
    max_file_gb: float = 5.0
    """With --save-hf: size of a safetensors file, in 10^9 bytes; a larger tensor has a file of its own."""
    verify: bool = True
    """Compare the logits of both by transformers before the result has its name; needs memory for the model in fp32."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        pairs = {"load_hf": "save", "load": "save_hf"}
        given = [source for source in pairs if getattr(self, source) is not None]
        if len(given) != 1:
            return ["Give --load-hf DIR and --save DIR to import, or --load DIR and --save-hf DIR to export."]
        source, (other,) = given[0], [name for name in pairs if name != given[0]]
        found = []
        if getattr(self, pairs[source]) is None:
            found.append(f"--{source.replace('_', '-')} needs --{pairs[source].replace('_', '-')} DIR to write to.")
        if getattr(self, pairs[other]) is not None:
            found.append(
                f"--{pairs[other].replace('_', '-')} goes with --{other.replace('_', '-')}, not with "
                f"--{source.replace('_', '-')}."
            )
        for name in ("ckpt_step", "family"):
            if source == "load_hf" and getattr(self, name) is not None:
                found.append(f"--{name.replace('_', '-')} goes with --load; leave it out.")
        if not 0 < self.max_file_gb < float("inf"):
            found.append(f"max_file_gb={self.max_file_gb:g} is no size; give a number above 0.")
        return found


def _import(options: ConvertOptions) -> None:
    from megatron_lite.checkpoint.huggingface import HuggingFaceFolder, is_folder
    from megatron_lite.checkpoint.store import holds_checkpoint
    from megatron_lite.config import huggingface, sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.train.engine_interface import DTYPES
    from megatron_lite.train.imported import arriving, how_to_begin, write_imported

    source, target = Path(options.load_hf), Path(options.save)
    if not is_folder(source) and holds_checkpoint(source):
        raise CheckpointError(f"{source} is a folder of checkpoints, which --load reads, and none of Hugging Face's")
    with HuggingFaceFolder(source) as folder, arriving(target) as temporary:
        folder.insist_on_tied_head()
        for note in folder.described.notes:
            log.warn(note)
        config = sources.override(RunConfig(), huggingface.overrides(source))
        dtype = None if options.dtype is None else DTYPES[options.dtype]
        family = folder.described.family
        write_imported(folder, folder.links, config, temporary, target, dtype, family)
        _verify(options, temporary, source)
    print(f"{target} holds the {family} of {source}; begin a run with it:\n{how_to_begin(target)}")


def _export(options: ConvertOptions) -> None:
    from megatron_lite.checkpoint import huggingface_names
    from megatron_lite.checkpoint.find import find
    from megatron_lite.checkpoint.huggingface import is_folder
    from megatron_lite.checkpoint.huggingface_export import export_weights
    from megatron_lite.checkpoint.manifest import read_manifest
    from megatron_lite.config import huggingface, sources
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh
    from megatron_lite.train.engine_interface import DTYPES
    from megatron_lite.train.imported import arriving

    target = Path(options.save_hf)
    folder = find(options.load, ProcessMesh(MeshShape(), 0), options.ckpt_step, only="weight/")
    if folder is None:
        theirs = " (it is a Hugging Face folder, which --load-hf reads)" if is_folder(Path(options.load)) else ""
        raise CheckpointError(f"{options.load} holds no complete checkpoint{theirs}; give the --save folder of a run")
    manifest = read_manifest(folder)
    config = sources.from_plain(manifest.config, str(folder))
    model, rows = config.model, manifest.tensors["weight/embedding.word.weight"].shape[0]
    family = options.family or huggingface.family_of(model, manifest.state.get("facts", {}).get("family"))
    huggingface.insist_on_family(model, family)
    learned = manifest.tensors.get("weight/embedding.position.weight")
    positions = learned.shape[0] if learned else model.max_position_embeddings or config.data.seq_length
    links = huggingface_names.links(model, family, vocab_size=rows, positions=positions)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    with arriving(target) as temporary:
        tokenizer, goes_along = _export_tokenizer(folder, manifest, config.data, temporary)
        written = export_weights(
            folder, manifest, links, temporary, dtype=dtype, max_file_bytes=int(options.max_file_gb * _GB)
        )
        stored = manifest.tensors["weight/embedding.word.weight"].dtype
        content = huggingface.config_json(
            model,
            family,
            vocab_size=rows,
            positions=positions,
            dtype=_HF_DTYPES[{"fp32": "F32", "bf16": "BF16", "fp16": "F16", None: stored}[options.dtype]],
            bos=tokenizer and tokenizer.bos,
            eos=tokenizer and tokenizer.eos,
        )
        (temporary / huggingface.CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        _verify(options, folder, temporary, tokenizer if goes_along else None)
    files = len(set(written.values()))
    print(f"{target} holds step {manifest.step} of {options.load} as {family}: {len(written)} tensors in {files} files")


def _export_tokenizer(folder: Path, manifest: Manifest, data: DataConfig, into: Path) -> tuple[Tokenizer | None, bool]:
    """The tokenizer, if it can be had, and whether its files were written; it is said why not."""
    from megatron_lite.data import tokenizer_files
    from megatron_lite.data.tokenizer_export import export_tokenizer
    from megatron_lite.errors import TokenizerError

    if data.tokenizer_type is None:
        log.warn("the checkpoint names no tokenizer, so none is written")
        return None, False
    plain = dataclasses.replace(data, special_tokens=())
    fingerprint = manifest.state.get("facts", {}).get("tokenizer")
    try:
        tokenizer = tokenizer_files.tokenizer_of_training(folder, data, fingerprint)
    except TokenizerError as error:
        log.warn(f"no tokenizer is written: {error}")
        return None, False
    read_from = tokenizer_files.copied(plain, folder.parent / tokenizer_files.FOLDER) or data
    reason = export_tokenizer(tokenizer, dataclasses.replace(read_from, special_tokens=data.special_tokens), into)
    if reason is not None:
        log.warn(f"no tokenizer is written: {reason}")
    return tokenizer, reason is None


def _verify(options: ConvertOptions, checkpoint: Path, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Raise CheckpointError unless a checkpoint and a Hugging Face folder give the same logits.

    Where the tokenizers in both differ it is only said: one project's files cannot always be the other's.
    """
    from megatron_lite.train.against_transformers import compare_logits, is_installed, tokenizer_fault

    if not options.verify:
        log.warn("logits were not compared (--no-verify)")
        return
    if not is_installed():
        log.warn("transformers is not installed, so logits were NOT compared: pip install transformers")
        return
    agreement = compare_logits(checkpoint, folder, options.dtype)
    if not agreement.holds:
        raise CheckpointError(f"the models differ: {agreement}; nothing was written")
    print(f"transformers agrees: {agreement}")
    if tokenizer is not None and (fault := tokenizer_fault(tokenizer, folder)):
        log.warn(fault)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""

    def convert(me: Launch) -> None:
        if me.world_size > 1:
            raise ConfigError("convert_checkpoint.py works in one process; start it by python.")
        options = read(
            ConvertOptions,
            sys.argv[1:] if argv is None else argv,
            prog="convert_checkpoint.py",
            description="Turn a Hugging Face folder into a checkpoint, or a checkpoint into a Hugging Face folder.",
            default=ConvertOptions(),
        )
        try:
            (_export if options.load_hf is None else _import)(options)
        except OSError as error:
            raise ConfigError(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}.") from None

    return exit_code_of(convert)


if __name__ == "__main__":
    sys.exit(main())
