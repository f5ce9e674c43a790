"""Which checkpoint to go on from: the newest that is complete and undamaged, agreed by all ranks."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import FILE_NAME, box_bytes, read_manifest
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.shard import ShardReader, by_readers
from megatron_lite.errors import CheckpointError


def find(root: str | os.PathLike[str], ranks: Ranks, step: int | None = None, *, only: str = "") -> Path | None:
    """The newest checkpoint under `root` (or that of `step`) whose every byte matches its checksum.

    All ranks call and get the same answer; each reads its share of the bytes. A damaged one is named,
    with the file at fault, and the step before is tried. `only` leaves tensors unread whose name does
    not begin with it. `root` may itself be the folder of one checkpoint.

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
    faults = []
    for at, name in names:
        folder = root / name
        try:
            together(ranks, lambda folder=folder, at=at: verify(folder, at, only, ranks.global_rank, ranks.world_size))
        except RankFailures as failures:
            faults.append(f"{folder} cannot be used: {failures}")
            log.warn(faults[-1])
            continue
        if faults:
            log.warn(f"going back to {folder}")
        return folder
    if faults:
        raise CheckpointError(
            f"no checkpoint under {root} can be used:\n" + "\n".join(f"  {fault}" for fault in faults)
        )
    return None


def _candidates(root: Path) -> list[tuple[int | None, str]]:
    """Pairs (step, folder name) by falling step; the root itself if it is a checkpoint."""
    if (root / FILE_NAME).exists():
        return [(read_manifest(root).step, ".")]
    return [(step, path.name) for step, path in reversed(store.steps(root).items())]


def verify(
    folder: str | os.PathLike[str], step: int | None = None, only: str = "", part: int = 0, parts: int = 1
) -> None:
    """Check manifest, files and checksums of one checkpoint; every `parts`-th chunk from `part` on.

    Raises CheckpointError naming file and byte range, or file and field.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if step is not None and manifest.step != step:
        raise CheckpointError(f"{folder / FILE_NAME}: step is {manifest.step}, but the folder stands for {step}")

    def read(reader_part: int, reader_parts: int) -> None:
        turn = 0
        with ShardReader(folder, manifest) as reader:
            if reader_part == 0:
                for name in manifest.files:
                    reader.check_file(name)
            for name, tensor in manifest.tensors.items():
                if not name.startswith(only):
                    continue
                for box in tensor.boxes:
                    nbytes = box_bytes(tensor.dtype, box.rectangle.size)
                    for index in range(len(box.crc32)):
                        if turn % (parts * reader_parts) == part * reader_parts + reader_part:
                            reader.chunk(box, nbytes, index)
                        turn += 1

    by_readers(read)
