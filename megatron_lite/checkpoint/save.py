"""Saving: every rank writes what it owns, and the whole appears under its name or not at all.

The ranks exchange what they are about to do, write into a temporary folder, and exchange how it went.
If all went well rank 0 writes the manifest and renames; if anything failed anywhere, every rank learns
of it by the same exchange, the temporary folder goes, and what was there before is untouched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.manifest import FILE_NAME, encode, merged_tensors, parse, shard_name
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.shard import ShardPlan, keep_to
from megatron_lite.errors import CheckpointError, CheckpointNotSaved

#: Disk space asked for beside the tensors: headers are counted, the manifest is not.
_SPARE_BYTES = 2**20


def save(
    root: str | os.PathLike[str],
    step: int,
    pieces: Sequence[Piece],
    state: dict[str, Any],
    ranks: Ranks,
    *,
    layout: str,
    config: dict[str, Any],
    versions: dict[str, str],
    claim: store.Claim | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    spared: Collection[int] = (),
    best_step: int | None = None,
    deadline: Callable[[], float | None] = lambda: None,
) -> Path:
    """The checkpoint of `step`, complete and durable in its folder under `root`. All ranks call.

    `pieces` are this rank's; over all ranks the owned ones tile every tensor. `state`, `config` and
    `versions` are plain JSON, and rank 0's are written. `best_step` is the step, this or an earlier one, whose
    checkpoint is marked as the best one; then others are deleted as `store.prune` has it. `deadline` gives
    the time.monotonic() value past which the save is given up, asked again and again. A checkpoint of the
    same step is replaced, those of later steps are set aside. `claim` is the caller's right to write under `root`.

    Raises, on all ranks alike: CheckpointNotSaved when the disk is full, an I/O error occurs or the
    deadline passes (the run may go on: memory and earlier checkpoints are as they were);
    CheckpointError when the ranks' pieces or steps do not fit together.
    """
    root = Path(root)
    plan = ShardPlan(pieces, step)
    temporary: Path | None = None
    try:
        prepared = together(ranks, lambda: _prepare(root, step, plan, ranks))
        _agree(root, prepared)
        token = prepared[0]["token"]
        temporary = root / store.temporary_name(store.step_name(step), token)
        parts = together(ranks, lambda: _write(temporary, plan, ranks, deadline))

        def publish() -> None:
            if ranks.global_rank == 0:
                files = {name: entry for part in parts for name, entry in part["files"].items()}
                tensors = merged_tensors([part["tensors"] for part in parts])
                raw = encode(step, layout, config, versions, state, files, tensors)
                _check_complete(temporary, raw)
                keep_to(deadline)
                if claim is not None:
                    claim.insist()
                store.write_durably(temporary / FILE_NAME, raw)
                if best_step != step:
                    store.unmark(root, step)
                store.publish(root, step, token)

        together(ranks, publish)
    except RankFailures as failures:
        if temporary is not None and ranks.global_rank == 0:
            store.discard(temporary)
        if not failures.is_io:
            raise CheckpointError(f"the checkpoint of step {step} cannot be made: {failures}") from failures
        raise CheckpointNotSaved(
            f"the checkpoint of step {step} was not saved ({failures}); earlier ones are untouched"
        ) from failures
    if ranks.global_rank == 0:
        _tidy(root, step, token, best_step, keep_last, keep_every, spared)
    return root / store.step_name(step)


def _prepare(root: Path, step: int, plan: ShardPlan, ranks: Ranks) -> dict[str, Any]:
    store.make_folder(root)
    if ranks.global_rank == 0:
        store.sweep(root)
    disk = shutil.disk_usage(root)
    # Some mounted object stores report no size at all.
    free = disk.free if disk.total else None
    return {"step": step, "bytes": plan.size, "free": free, "token": store.new_token()}


def _agree(root: Path, prepared: list[dict[str, Any]]) -> None:
    """Stop before anything is written if the ranks are at different steps or the disk is too full."""
    if not any(told["bytes"] for told in prepared):
        raise CheckpointError("no rank owns a tensor: there is nothing to save")
    saved_steps = sorted({told["step"] for told in prepared})
    if len(saved_steps) > 1:
        raise CheckpointError(f"the ranks are at different steps, {saved_steps}: no common checkpoint can be saved")
    needed = sum(told["bytes"] for told in prepared) + _SPARE_BYTES
    free = min((told["free"] for told in prepared if told["free"] is not None), default=needed)
    if needed > free:
        raise CheckpointNotSaved(
            f"the checkpoint of step {saved_steps[0]} was not saved: it needs {needed / 1e9:.3f} GB and {root} has "
            f"{free / 1e9:.3f} GB free; free some space, or keep fewer checkpoints (--keep-last)"
        )


def _write(temporary: Path, plan: ShardPlan, ranks: Ranks, deadline: Callable[[], float | None]) -> dict[str, Any]:
    temporary.mkdir(exist_ok=True)
    return plan.write(temporary / shard_name(ranks.global_rank), deadline)


def _check_complete(temporary: Path, raw: bytes) -> None:
    """Read the manifest as a loader will, before it counts: coverage, ranges, files and their sizes."""
    for name, entry in parse(raw, "the new manifest").files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry.size:
            raise CheckpointError(
                f"rank 0 does not see {path} as written; --save must be on a file system that all ranks share"
            )


def _tidy(
    root: Path,
    step: int,
    token: str,
    best_step: int | None,
    keep_last: int | None,
    keep_every: int | None,
    spared: Collection[int],
) -> None:
    """What follows a published checkpoint, and costs no checkpoint when it fails."""
    try:
        store.point(root, "latest", step, token)
        store.mark_best(root, best_step, token)
        if keep_last is not None:
            store.prune(root, keep_last, keep_every, spared)
    except OSError as error:
        log.warn(f"the checkpoint of step {step} is saved, but {root} could not be tidied: {error}")
