"""What an error is to the ranks that had no part in it: another rank's end, another rank's silence, or theirs too."""

from __future__ import annotations

import re
import traceback

import torch.distributed as dist

from megatron_lite import log
from megatron_lite.errors import HangError, LostRankError
from megatron_lite.parallel.roll_call import RollCall

#: What gloo, nccl and torch's store say when the other end did not answer in time, or is gone.
_TIMED_OUT = ("Timed out waiting", "caused pair closure", "collective operation timeout", "wait timeout after")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh failed")
#: nccl errors that another rank has no part in.
_OF_THIS_RANK = ("ncclUnhandledCudaError", "ncclInvalidUsage", "ncclInvalidArgument")


def in_a_line(error: Exception) -> str:
    """What an error is, for those that shall hear of it."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def tell_traceback(roll: RollCall) -> None:
    """Show the exception at hand, which nobody foresaw: in full by one rank where several have one."""
    whole = traceback.format_exc()
    if roll.is_first_to("show a traceback"):
        log.every_rank(whole)
    else:
        log.aside(whole)
        log.every_rank(f"error: {whole.splitlines()[-1]}")


def explained(error: Exception, rank: int) -> Exception:
    """`error`, or HangError or LostRankError where a collective failed because of another rank."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text:
        return error
    # Without the place in the library's source before it, and its guesses after.
    line = re.sub(r"^\[\S*\] ", "", text.splitlines()[0]).partition(". This is typically")[0]
    if any(words in text for words in _TIMED_OUT):
        return HangError(
            f"rank {rank} waited in vain for another rank: a collective did not end within "
            f"--distributed-timeout-minutes ({line}); raise it where a step, a load or a save may take longer"
        )
    of_the_backend = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    if any(words in text for words in _GONE) or (of_the_backend and not any(words in text for words in _OF_THIS_RANK)):
        return LostRankError(f"another rank is gone, seen by rank {rank}: {line}")
    return error
