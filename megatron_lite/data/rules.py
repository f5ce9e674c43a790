"""What a configuration may ask of the data, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from megatron_lite.config.data import DataConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data.data_path import prefixes_of
from megatron_lite.data.documents import parse_split
from megatron_lite.data.indexed import paths
from megatron_lite.data.mixture_rules import mixture_problems
from megatron_lite.data.stream import parse_skip_ranges
from megatron_lite.data.tokenizer_files import FILES_IN_A_COPY
from megatron_lite.errors import ConfigError


def problems(config: RunConfig) -> list[str]:
    """One sentence for each thing of the data section (and --skip-samples) that cannot be."""
    data, found = config.data, []
    own_paths = {
        "train_data_path": data.train_data_path,
        "valid_data_path": data.valid_data_path,
        "test_data_path": data.test_data_path,
    }
    given = [name for name, entries in {"data_path": data.data_path, **own_paths}.items() if entries]
    if data.mock_data and given:
        found.append(f"mock_data generates tokens and {given[0]} names token files; give one of the two.")
    elif data.data_path and len(given) > 1:
        found.append(
            f"data_path is divided by split, {given[1]} is a set of its own; give data_path alone, or "
            "train_data_path with valid_data_path and test_data_path."
        )
    elif not data.mock_data and not data.data_path and not data.train_data_path:
        found.append(
            "there is nothing to train on; give --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data "
            "to try a configuration."
        )
    elif data.train_data_path and not data.valid_data_path and config.training.eval_interval > 0:
        found.append(
            f"eval_interval={config.training.eval_interval} and train_data_path has no valid_data_path beside it; give "
            "one, or --eval-interval 0."
        )
    for entries in (data.data_path, *own_paths.values()):
        found += _path_problems(entries)
    found += _tokenizer_problems(data)
    found += mixture_problems(config)
    found += _said_by(parse_split, data.split)
    found += _said_by(parse_skip_ranges, config.training.skip_samples)
    if data.sample_stride is not None and data.sample_stride > data.seq_length:
        found.append(
            f"sample_stride={data.sample_stride} is above seq_length={data.seq_length}, so tokens between samples "
            f"would never be read; choose 1 to {data.seq_length}."
        )
    return [*found, *_document_problems(data), *_curriculum_problems(data)]


def _document_problems(data: DataConfig) -> Iterator[str]:
    if data.eod_mask_loss and data.tokenizer_type is None:
        yield (
            "--eod-mask-loss leaves out what follows an end-of-document token, and without a tokenizer nobody knows "
            "which that is; give --tokenizer-type with its files, or leave it out."
        )


def _curriculum_problems(data: DataConfig) -> Iterator[str]:
    first, full, step = data.curriculum_seq_length_min, data.seq_length, data.curriculum_seq_length_step
    if first is None:
        defaults = DataConfig()
        for name in ("samples", "schedule", "step", "root"):
            field = f"curriculum_seq_length_{name}"
            if (value := getattr(data, field)) != getattr(defaults, field):
                yield f"{field}={value} needs a length to begin with; give --curriculum-seq-length-min too."
        return
    if data.curriculum_seq_length_samples is None:
        yield (
            f"curriculum_seq_length_min={first} grows to seq_length={full}, but nothing says when; give "
            "--curriculum-seq-length-samples."
        )
    if first >= full:
        yield f"curriculum_seq_length_min={first} is not below seq_length={full}; choose less, or leave it out."
    elif data.curriculum_seq_length_schedule != "step" and step >= 1 and first % step:
        lower = first // step * step
        yield (
            f"curriculum_seq_length_min={first} is no multiple of curriculum_seq_length_step={step}, and nor would the "
            f"lengths after it be; choose {f'{lower} or ' if lower else ''}{lower + step}, or another step."
        )


def _path_problems(entries: Sequence[str]) -> list[str]:
    try:
        prefixes = prefixes_of(entries)
    except ConfigError as error:
        return error.problems
    missing = [str(path) for prefix in prefixes for path in paths(prefix) if not os.path.exists(path)]
    if not missing:
        return []
    return [f"data path: cannot find {' and '.join(missing)}; name PREFIX of a pair PREFIX.bin and PREFIX.idx."]


def _tokenizer_problems(data: DataConfig) -> Iterator[str]:
    if data.tokenizer_type is None:
        return
    needed = FILES_IN_A_COPY.get(data.tokenizer_type, {})
    for name in needed:
        flag, path = f"--{name.replace('_', '-')}", getattr(data, name)
        if path is None:
            yield f"tokenizer_type={data.tokenizer_type} is read from a file; give it by {flag}."
        elif not os.path.exists(path):
            yield f"{name}={path} is not there; {data.tokenizer_type} reads it."


def _said_by(parse: Callable[..., object], value: object) -> list[str]:
    try:
        parse(value)
    except ConfigError as error:
        return error.problems
    return []
