"""Loading: the rectangles a rank wants, out of whatever rectangles were stored. Resharding is just this.

Only chunks that hold something wanted are read, each once, checked, and copied into place.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lite import log
from megatron_lite.checkpoint.arrival import Arrival, Taking, Values
from megatron_lite.checkpoint.boxes import rectangles_of
from megatron_lite.checkpoint.manifest import (
    CODE_DTYPES,
    ITEM_BYTES,
    Manifest,
    StoredBox,
    absmax_bytes,
    box_bytes,
    read_manifest,
)
from megatron_lite.checkpoint.piece import DTYPES, Piece
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.shard import ShardReader, by_readers
from megatron_lite.errors import CheckpointDamaged, CheckpointError, MegatronLiteError

_SHOWN = 4


def load(
    folder: str | os.PathLike[str],
    pieces: Sequence[Piece],
    ranks: Ranks,
    *,
    only: str = "",
    cast: bool = False,
    manifest: Manifest | None = None,
) -> dict[str, Any]:
    """The state of the checkpoint in `folder`, its tensors written into `pieces` in place. All ranks call.

    With `only`, pieces and stored tensors whose names do not begin with it are left alone
    (`only="weight/"` takes no optimizer state). With `cast`, values are rounded to the dtype of the
    piece they go to; without it only 8-bit codes and fp32 may take each other's place, which is said in the
    log. Every byte that is used has been checked. `manifest` is that of `folder`, where it has been read already.

    Raises, on all ranks alike: CheckpointError when a tensor is missing, superfluous, or of another shape or dtype,
    and nothing has been written; CheckpointDamaged when what is stored cannot be read or does not match its checksum,
    and `pieces` may have been written in part. What says nothing against the checkpoint (no memory, too many open
    files, a mistake in the program) is raised as it is where it happened, as an error that tells of it elsewhere.
    """
    folder = Path(folder)
    wanted = [piece for piece in pieces if piece.name.startswith(only)]
    try:
        manifest = _read_and_match(folder, manifest, wanted, ranks, only, cast)
        _tell_conversions(folder, manifest, wanted)
        together(ranks, lambda: fill(folder, manifest, wanted))
    except RankFailures as failures:
        text = f"{folder} cannot be loaded: {failures}"
        if not failures.is_explained:
            raise failures.unforeseen or MegatronLiteError(text) from None
        is_damage = not any(failure.is_io for failure in failures.failures)
        raise (CheckpointDamaged if is_damage else CheckpointError)(text) from failures
    return manifest.state


def read_tensor(folder: str | os.PathLike[str], name: str) -> torch.Tensor:
    """One whole tensor of a checkpoint, on the CPU, in its stored dtype; of 8-bit codes in fp32.

    Raises what `ShardReader` does."""
    manifest = read_manifest(folder)
    if name not in manifest.tensors:
        raise CheckpointError(f"{folder} holds no tensor {name!r}; it holds {_some(manifest.tensors)}")
    stored = manifest.tensors[name]
    whole = torch.empty(stored.shape, dtype=DTYPES.get(stored.dtype, torch.float32))
    fill(Path(folder), manifest, [Piece(name, stored.shape, (0,) * len(stored.shape), whole, owned=False)])
    return whole


def _read_and_match(
    folder: Path, manifest: Manifest | None, wanted: list[Piece], ranks: Ranks, only: str, cast: bool
) -> Manifest:
    """The manifest, if what all ranks want together is what it holds.

    Each rank tells which stored tensors it takes as the bits of one number, not by thousands of names.
    """

    def compare() -> dict[str, Any]:
        nonlocal manifest
        manifest = manifest or read_manifest(folder)
        names = {piece.name for piece in wanted}
        return {
            "taken": hex(sum(1 << bit for bit, name in enumerate(manifest.tensors) if name in names)),
            "missing": sorted(names - manifest.tensors.keys()),
            "differing": _differing(wanted, manifest, cast),
        }

    answers = together(ranks, compare)
    taken = 0
    for answer in answers:
        taken |= int(answer["taken"], 16)
    missing = sorted({name for answer in answers for name in answer["missing"]})
    differing = sorted({text for answer in answers for text in answer["differing"]})
    matched = {name for bit, name in enumerate(manifest.tensors) if taken >> bit & 1}
    unexpected = [name for name in manifest.tensors if name.startswith(only) and name not in matched]
    if missing or differing or unexpected:
        raise CheckpointError(_mismatch(folder, manifest, matched, missing, unexpected, differing))
    return manifest


def _differing(wanted: list[Piece], manifest: Manifest, cast: bool) -> list[str]:
    found = {}
    for piece in wanted:
        stored = manifest.tensors.get(piece.name)
        if stored and (stored.shape != piece.global_shape or not (cast or _fits(stored.dtype, piece.dtype_name))):
            there = f"{stored.dtype} {list(stored.shape)} there"
            found[piece.name] = f"{piece.name} is {there} and {piece.dtype_name} {list(piece.global_shape)} here"
    return list(found.values())


def _fits(there: str, here: str) -> bool:
    return there == here or (there in CODE_DTYPES and here == "F32") or (there == "F32" and here in CODE_DTYPES)


def _tell_conversions(folder: Path, manifest: Manifest, wanted: list[Piece]) -> None:
    changes = {(manifest.tensors[piece.name].dtype in CODE_DTYPES, piece.absmax is not None) for piece in wanted}
    if (True, False) in changes:
        log.note(f"what {folder} holds in 8 bits becomes fp32 here")
    if (False, True) in changes:
        log.note(f"fp32 state of {folder} becomes 8-bit codes here")


def _mismatch(
    folder: Path, manifest: Manifest, matched: set[str], missing: list[str], unexpected: list[str], differing: list[str]
) -> str:
    parts = []
    layers_there, layers_here = _layers(manifest.tensors), _layers(matched.union(missing))
    if layers_there != layers_here:
        parts.append(f"the checkpoint holds {layers_there} layers, this model {layers_here}")
    if missing:
        parts.append(f"{len(missing)} tensors of this model are not in it ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} of its tensors are not in this model ({_some(unexpected)})")
    if differing:
        parts.append(f"{len(differing)} tensors differ ({_some(differing)})")
    ways = "start with the model settings it was trained with"
    if not any(name.startswith("weight/") for name in missing + unexpected) and not differing:
        ways = "take its weights alone by --no-load-optim or --finetune"
    return f"{folder} does not fit this model: {'; '.join(parts)}. To go on, {ways}."


def _layers(names: Collection[str]) -> int:
    return len({found[1] for name in names if (found := re.search(r"\blayers\.(\d+)\.", name))})


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:_SHOWN])
    return f"{first}, ..." if len(names) > _SHOWN else first


def fill(folder: Path, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Read `pieces` of stored tensors in place, whatever their dtype: parts of tensors too.

    Raises what `ShardReader` does."""
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)

    def read(reader: ShardReader, name: str) -> None:
        stored = manifest.tensors[name]
        arrivals = [Arrival(piece, stored) for piece in by_name[name]]
        for box in stored.boxes:
            takings = [taking for arrival in arrivals if (taking := arrival.taking(box))]
            if takings:
                _fill_from_box(reader, manifest.chunk_bytes, stored.dtype, box, takings)
        for arrival in arrivals:
            arrival.finish()

    # The longest first, so that all threads end at about the same time.
    by_readers(folder, manifest, sorted(by_name, key=lambda name: -sum(p.nbytes for p in by_name[name])), read)


def _fill_from_box(reader: ShardReader, chunk_bytes: int, dtype: str, box: StoredBox, takings: list[Taking]) -> None:
    """Copy what arrivals take of one box, chunk by chunk; a chunk is a few rectangles of its box."""
    head, item = absmax_bytes(dtype, box.rectangle.size), ITEM_BYTES[dtype]
    nbytes = box_bytes(dtype, box.rectangle.size)
    absmax = torch.empty(head // 4)
    wanted = {
        *_chunks(0, head, chunk_bytes),
        *_chunks(min(taking.first for taking in takings), max(taking.last for taking in takings), chunk_bytes),
    }
    for index in sorted(wanted):
        at = index * chunk_bytes
        end = min(at + chunk_bytes, nbytes)
        touched = [taking for taking in takings if taking.first < end and at < taking.last]
        into = touched[0].memory_of(at, end) if len(touched) == 1 else None
        raw = reader.chunk(box, nbytes, index, into)
        if into is not None:
            continue
        absmax.view(torch.uint8)[at:end] = torch.frombuffer(raw, dtype=torch.uint8)[: max(0, head - at)]
        if end <= head:
            continue
        values = Values(dtype, raw[max(0, head - at) :], absmax, first=max(0, at - head) // item)
        for part, flat in rectangles_of(box.rectangle.shape, values.first, values.last):
            source = part.moved(box.rectangle.start)
            for arrival, *_ in touched:
                if shared := source.overlap(arrival.rectangle):
                    arrival.take(shared, source, values, flat)
    for arrival, *_ in takings:
        arrival.take_absmax(box, absmax)


def _chunks(first: int, last: int, chunk_bytes: int) -> range:
    """The chunks that hold bytes [first, last)."""
    return range(first // chunk_bytes, -(-last // chunk_bytes))
