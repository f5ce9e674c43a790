"""Records divided by key into files that each fit in memory, to find equal keys among more than memory holds."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_lite.data.refine.words import mixed

_SORTING_FACTOR = 6
"""Memory that sorting takes, in sizes of what is sorted."""
_MOST_FILES = 256
_BUFFER_SHARE = 4


@contextlib.contextmanager
def temporary_folder(inside: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    inside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=inside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parted(records: Iterable[np.ndarray], size: int, folder: Path, memory: int) -> Iterator[np.ndarray]:
    """uint64 records [n, 1 + payload], equal first columns together, in parts that can be sorted within `memory` bytes.

    `size` is their bytes in all. What is of one key is in one part, in the order given.
    """
    parts = min(max(1, -(-size * _SORTING_FACTOR // memory)), _MOST_FILES)
    if parts == 1:
        found = [block for block in records if len(block)]
        if found:
            yield np.concatenate(found)
        return
    width = 1
    paths = [folder / f"part-{number:03d}" for number in range(parts)]
    with contextlib.ExitStack() as opened:
        buffer = max(memory // _BUFFER_SHARE // parts, 1 << 12)
        files = [opened.enter_context(open(path, "wb", buffering=buffer)) for path in paths]
        for block in records:
            width = block.shape[1]
            # Not the key's own bits: they may be few in use.
            number = mixed(block[:, 0]) % np.uint64(parts)
            order = np.argsort(number, kind="stable")
            bounds = np.searchsorted(number[order], np.arange(parts + 1, dtype=np.uint64))
            for part in range(parts):
                files[part].write(block[order[bounds[part] : bounds[part + 1]]].tobytes())
    for path in paths:
        block = np.fromfile(path, np.uint64).reshape(-1, width)
        path.unlink()
        if len(block):
            yield block


def runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): a stable order of rows [n, k] by all columns, and where in it each set of equal rows begins."""
    order = np.lexsort(keys.T[::-1])
    ordered = keys[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, np.flatnonzero(new)
