"""Which checkpoint to go on from: the newest that is complete and undamaged, agreed by all ranks."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import FILE_NAME, Manifest, box_bytes, read_manifest
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.shard import ShardReader, by_readers
from megatron_lite.errors import CheckpointError


class Found(NamedTuple):
    """A checkpoint to go on from."""

    folder: Path
    manifest: Manifest


def find(root: str | os.PathLike[str], ranks: Ranks, step: int | None = None, *, only: str = "") -> Path | None:
    """The newest checkpoint under `root` (or that of `step`) whose every byte matches its checksum, as `search` has
    it."""
    found = search(root, ranks, step, only=only)
    return found and found.folder


def search(
    root: str | os.PathLike[str], ranks: Ranks, step: int | None = None, *, only: str = "", values: bool = True
) -> Found | None:
    """The newest checkpoint under `root` (or that of `step`) whose every byte matches its checksum.

    All ranks call and get the same answer; each reads its share of the bytes. A damaged one is named,
    with the file at fault, and the step before is tried. `only` leaves tensors unread whose name does
    not begin with it. Without `values` manifest, sizes and headers are looked at alone: for a load, which checks the
    values it reads. `root` may itself be the folder of one checkpoint.

    None when there is no checkpoint at all. Raises CheckpointError when there are some and none is
    whole, or when `step` is not there: a run must not start from nothing by accident.
    """
    root = Path(root)
    try:
        names = together(ranks, lambda: _candidates(root) if ranks.global_rank == 0 else None)[0]
    except RankFailures as failures:
        raise CheckpointError(f"{root} cannot be read: {failures}") from failures
    if step is not None:
        if step not in [at for at, _ in names]:
            there = ", ".join(str(at) for at, _ in names) or "none"
            raise CheckpointError(f"{root} holds no checkpoint of step {step}; it holds {there}")
        names = [(at, name) for at, name in names if at == step]
    manifest: Manifest

    def check(folder: Path, at: int | None) -> None:
        nonlocal manifest
        manifest = verify(folder, at, only, ranks.global_rank, ranks.world_size, values=values)

    faults = []
    for at, name in names:
        folder = root / name
        try:
            together(ranks, functools.partial(check, folder, at))
        except RankFailures as failures:
            faults.append(f"{folder} cannot be used: {failures}")
            log.warn(faults[-1])
            continue
        if faults:
            log.warn(f"the newest under {root} that can be used is {folder}")
        return Found(folder, manifest)
    if faults:
        raise CheckpointError(
            f"no checkpoint under {root} can be used:\n" + "\n".join(f"  {fault}" for fault in faults)
        )
    return None


def is_whole(found: Found, ranks: Ranks) -> bool:
    """Whether every byte of a checkpoint matches its checksum; what does not is named. All ranks call, and get the
    same answer."""
    try:
        together(ranks, lambda: bool(verify(found.folder, None, "", ranks.global_rank, ranks.world_size)))
    except RankFailures as failures:
        log.warn(f"{found.folder} does not count as saved: {failures}")
        return False
    return True


def _candidates(root: Path) -> list[tuple[int | None, str]]:
    """Pairs (step, folder name) by falling step; the root itself if it is a checkpoint."""
    if (root / FILE_NAME).exists():
        named = store.step_of(root)
        return [(read_manifest(root).step if named is None else named, ".")]
    return [(step, path.name) for step, path in reversed(store.steps(root).items())]


def verify(
    folder: str | os.PathLike[str],
    step: int | None = None,
    only: str = "",
    part: int = 0,
    parts: int = 1,
    *,
    values: bool = True,
) -> Manifest:
    """The manifest of one checkpoint, checked with sizes, headers and checksums: every `parts`-th file and chunk from
    `part` on, no chunks without `values`.

    Raises CheckpointError naming file and byte range, or file and field.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if step is not None and manifest.step != step:
        raise CheckpointError(f"{folder / FILE_NAME}: step is {manifest.step}, but the folder stands for {step}")
    with ShardReader(folder, manifest) as reader:
        for name in list(manifest.files)[part::parts]:
            reader.check_file(name)
    if values:
        chunks = (
            (box, box_bytes(tensor.dtype, box.rectangle.size), index)
            for name, tensor in manifest.tensors.items()
            if name.startswith(only)
            for box in tensor.boxes
            for index in range(len(box.crc32))
        )
        by_readers(
            folder, manifest, itertools.islice(chunks, part, None, parts), lambda reader, chunk: reader.chunk(*chunk)
        )
    return manifest
