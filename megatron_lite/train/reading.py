"""Reading the micro-batches of a step on all ranks, so that what one rank cannot read stops all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.micro_batch import MicroBatch
from megatron_lite.errors import DataError
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.build import together


def read(
    loader: BatchLoader,
    mesh: ProcessMesh,
    consumed_samples: int,
    global_batch_size: int,
    count: Callable[[list[MicroBatch]], list[float]],
) -> tuple[list[MicroBatch], list[float]]:
    """This rank's micro-batches, and the numbers that `count` makes of them, summed over all ranks.

    Whether a rank failed goes along in that sum, which a step makes anyway. Raises on all ranks then, as
    `together` does.
    """
    micro_batches: list[MicroBatch] = []
    failure: Exception | None = None
    try:
        micro_batches = loader.step(consumed_samples, global_batch_size)
    except Exception as error:
        failure = error
    *sums, failures = mesh.sum_numbers([*count(micro_batches), failure is not None])
    if failures:
        together(mesh, lambda: _raise(failure))
    return micro_batches, sums


def count_targets(batches: list[MicroBatch], mesh: ProcessMesh) -> int:
    """The target tokens of a data rank's micro-batches, told by one of its ranks: 0 on the others."""
    return sum(int(batch.loss_mask.sum()) for batch in batches) if _tells(mesh) else 0


def checksum(batches: list[MicroBatch], mesh: ProcessMesh) -> int:
    """CRC-32 of each sample's number and tokens, added up; told as `count_targets` is.

    With which of its tokens do not count, and where in it attention or positions begin anew, if there are any. Its sum
    over ranks tells what a step was fed, whatever the layout: exact in fp64 to 2^21 samples.
    """
    if not _tells(mesh):
        return 0
    return sum(map(_checksum, batches))


def _checksum(batch: MicroBatch) -> int:
    marks = {0: (~batch.loss_mask).numpy()}
    if batch.begins is not None:
        marks[1] = batch.begins[:, 1:].numpy()
    if batch.positions is not None:
        marks[2] = (batch.positions[:, 1:] == 0).numpy()
    total = 0
    for i, (tokens, label) in enumerate(zip(batch.tokens.numpy(), batch.labels.numpy(), strict=True)):
        crc = zlib.crc32(label[-1:], zlib.crc32(tokens, batch.first_sample + i & 0xFFFFFFFF))
        for kind, marked in marks.items():
            # None is not told, so that what is trivial is the same as what is not there.
            if marked[i].any():
                crc = zlib.crc32(marked[i], crc ^ kind)
        total += crc
    return total


def no_target(samples: str, way_out: str) -> DataError:
    """What to raise, on all ranks, for samples that have no mean loss."""
    error = DataError(
        f"{samples}: none of their tokens counts as a target, so there is no loss to learn from. The loss mask beside "
        f"the token set (PREFIX.loss_mask) or --eod-mask-loss leaves out all of them; mend the mask, {way_out}."
    )
    error.on_all_ranks = True
    return error


def _tells(mesh: ProcessMesh) -> bool:
    return mesh.rank("tensor") == 0 and mesh.rank("pipe") == 0 and mesh.rank("context") == 0


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
