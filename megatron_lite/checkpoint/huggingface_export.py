"""Weights of a checkpoint as the safetensors files of a Hugging Face folder, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from megatron_lite.checkpoint.foreign import Link, by_ours, shape_of, their_shapes, widest
from megatron_lite.checkpoint.huggingface import INDEX, WEIGHTS
from megatron_lite.checkpoint.load import fill
from megatron_lite.checkpoint.manifest import ITEM_BYTES, Manifest
from megatron_lite.checkpoint.piece import DTYPE_NAMES, DTYPES, Piece
from megatron_lite.checkpoint.tensor_file import encode_header
from megatron_lite.errors import CheckpointError


def export_weights(
    folder: Path,
    manifest: Manifest,
    links: Iterable[Link],
    to: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int,
) -> dict[str, str]:
    """Write what `links` name of a checkpoint into the folder `to`; tensor name -> file.

    In `dtype`, or as stored. Several files with an index where one would exceed `max_file_bytes`. Raises
    CheckpointError for a model that is not the links', or damaged, and OSError.
    """
    links = list(links)
    _match(folder, manifest, links)
    parts: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        parts[link.theirs].append(link)
    tensors = {
        name: (
            DTYPE_NAMES[dtype or widest(manifest.tensors[f"weight/{part.ours}"].dtype for part in parts[name])],
            shape,
        )
        for name, shape in their_shapes(links).items()
    }
    files = list(_divide(tensors, max_file_bytes))
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with open(to / file, "xb") as written:
            written.write(encode_header({name: tensors[name] for name in names}, {"format": "pt"}))
            for name in names:
                written.write(_tensor(folder, manifest, *tensors[name], parts[name]))
            written.flush()
            os.fsync(written.fileno())
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(_nbytes(*tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return weight_map


def _match(folder: Path, manifest: Manifest, links: list[Link]) -> None:
    """Insist that the weights of the checkpoint are those of the links."""
    wanted = {f"weight/{name}": shape_of(parts) for name, parts in by_ours(links).items()}
    there = {name: tensor.shape for name, tensor in manifest.tensors.items() if name.startswith("weight/")}
    if wrong := sorted(wanted.items() ^ there.items()):
        raise CheckpointError(f"{folder} does not hold the model of its configuration: {wrong[0][0]} differs")


def _divide(tensors: Mapping[str, tuple[str, tuple[int, ...]]], most: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than `most` has a file of its own."""
    names, filled = [], 0
    for name, tensor in tensors.items():
        if names and filled + _nbytes(*tensor) > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += _nbytes(*tensor)
    yield names


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * torch.Size(shape).numel()


def _tensor(folder: Path, manifest: Manifest, dtype: str, shape: tuple[int, ...], parts: list[Link]) -> memoryview:
    """One of their tensors, put together from what it takes of ours."""
    values = torch.empty(shape, dtype=DTYPES[dtype])
    pieces = []
    for part in parts:
        name, box = f"weight/{part.ours}", part.their_rectangle
        view = part.view(values[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))])
        pieces.append(Piece(name, manifest.tensors[name].shape, part.our_start, view, owned=False))
    fill(folder, manifest, pieces)
    return memoryview(values.view(-1).view(torch.uint8).numpy())
