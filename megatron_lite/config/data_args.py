"""Data paths that are given in files, in the two forms of Megatron."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from megatron_lite.config.data import DataConfig
from megatron_lite.errors import ConfigError


def with_paths_of_files(data: DataConfig) -> DataConfig:
    """`data` with what --data-args-path and --per-split-data-args-path name in place of them.

    Raises ConfigError for a file that cannot be read and for paths that are given otherwise too.
    """
    paths: dict[str, tuple[str, ...]] = {}
    if data.data_args_path is not None:
        paths["data_path"] = tuple(_text("data_args_path", data.data_args_path).split())
        if not paths["data_path"]:
            raise ConfigError(
                f"data_args_path={data.data_args_path} is empty; write prefixes into it, with weights or not."
            )
    if data.per_split_data_args_path is not None:
        paths |= _of_splits(data.per_split_data_args_path)
    for name, words in paths.items():
        if getattr(data, name) not in ((), words):
            raise ConfigError(
                f"{name} is {' '.join(getattr(data, name))}, and the file of paths says {' '.join(words)}; give one."
            )
    return dataclasses.replace(data, data_args_path=None, per_split_data_args_path=None, **paths)


def _text(name: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}={path} cannot be read: {error}.") from error


def _of_splits(path: str) -> dict[str, tuple[str, ...]]:
    name = "per_split_data_args_path"
    try:
        content = json.loads(_text(name, path))
    except ValueError as error:
        raise ConfigError(f"{name}={path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not {*content} <= {"train", "valid", "test"}:
        raise ConfigError(f'{name}={path} must hold an object of the lists "train", "valid" and "test".')
    return {f"{split}_data_path": _words(name, path, split, words) for split, words in content.items() if words}


def _words(name: str, path: str, split: str, words: Any) -> tuple[str, ...]:
    if isinstance(words, str):
        return tuple(words.split())
    if not isinstance(words, list) or not all(isinstance(word, (str, int, float)) for word in words):
        raise ConfigError(f'{name}={path}: "{split}" is {words!r:.60}, not a list of prefixes and weights.')
    return tuple(map(str, words))
