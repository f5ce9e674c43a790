"""The files a tokenizer is read from, and a run's own copy of them, so that its folder can be moved. No torch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import TokenizerError

FOLDER = "tokenizer"
"""Name of the copy in a folder of checkpoints."""

ROLE_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Files beside a tokenizer.json that say which of its tokens begin a text, end it and pad it; the later one wins."""

FILE_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tiktoken_pattern")
"""The fields of `DataConfig` that name a tokenizer."""

FILES_IN_A_COPY: Mapping[str, Mapping[str, str]] = {
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "HuggingFaceTokenizer": {"tokenizer_model": "tokenizer.json"},
    "TiktokenTokenizer": {"tokenizer_model": "tokenizer.tiktoken"},
}
"""Tokenizer type -> field -> name of that file in a copy."""


def copy_tokenizer(data: DataConfig, folder: Path) -> None:
    """Make `folder` hold what the tokenizer of `data` is read from, and nothing else.

    It appears whole by a rename, and is left alone if it holds the same already. Does nothing for a
    tokenizer without files. Raises TokenizerError when a file cannot be read or written.
    """
    temporary, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("tmp", "old"))
    try:
        contents = {name: path.read_bytes() for name, path in _files(data).items()}
        if not contents or contents == _held(folder):
            return
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise TokenizerError(
            f"the tokenizer cannot be copied to {folder}: {error.filename}: {error.strerror}"
        ) from None


def copied(data: DataConfig, folder: Path) -> DataConfig | None:
    """`data` with its tokenizer read from the copy in `folder`; None where that holds no such tokenizer."""
    paths = {field: folder / name for field, name in FILES_IN_A_COPY.get(data.tokenizer_type or "", {}).items()}
    if not paths or not all(path.is_file() for path in paths.values()):
        return None
    return dataclasses.replace(data, **{field: str(path) for field, path in paths.items()})


def tokenizer_of_training(folder: Path, data: DataConfig, fingerprint: str | None) -> Tokenizer:
    """The tokenizer a checkpoint's `folder` was trained with: the copy beside it, else the files `data` names.

    Raises TokenizerError when neither is there with that fingerprint.
    """
    copy = copied(data, folder.parent / FOLDER)
    candidates = {"the copy beside the checkpoint": copy, "the one training read": data}
    reasons = []
    for name, candidate in candidates.items():
        if candidate is None:
            continue
        try:
            tokenizer = build_tokenizer(candidate)
        except TokenizerError as error:
            reasons.append(str(error))
            continue
        if fingerprint in (None, tokenizer.fingerprint):
            return tokenizer
        reasons.append(f"{name} is another one now (fingerprint {tokenizer.fingerprint[:12]}, not {fingerprint[:12]})")
    raise TokenizerError(
        f"the tokenizer of {folder} is not to be had: {'; '.join(reasons)}. Name its files by --tokenizer-model, or by "
        f"--vocab-file and --merge-file"
    )


def _files(data: DataConfig) -> dict[str, Path]:
    """Name in a copy -> file, of all that the tokenizer of `data` is read from."""
    found: dict[str, Path] = {}
    for field, name in FILES_IN_A_COPY.get(data.tokenizer_type or "", {}).items():
        path = Path(getattr(data, field))
        found[name] = path / name if path.is_dir() else path
    if data.tokenizer_type == "HuggingFaceTokenizer":
        beside = found["tokenizer.json"].parent
        found |= {name: beside / name for name in ROLE_FILES if (beside / name).is_file()}
    return found


def _held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
