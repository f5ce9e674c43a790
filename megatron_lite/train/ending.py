"""How a run ends: what is said, and what its `exit.json` tells, whatever ended it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_lite import log
from megatron_lite.errors import EXIT_DONE, EXIT_ERROR, HangError, LostRankError, MegatronLiteError
from megatron_lite.monitor import exit_file
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.plan.report import memory_comparison
from megatron_lite.train.loop import EARLY_STOPPING, Run

#: What gloo, nccl and torch's store say when the other end did not answer in time, or is gone.
_TIMED_OUT = ("Timed out waiting", "caused pair closure", "collective operation timeout", "wait timeout after")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
#: nccl errors that another rank has no part in.
_OF_THIS_RANK = ("ncclUnhandledCudaError", "ncclInvalidUsage", "ncclInvalidArgument")


def tell_end(run: Run, reason: str, command: str) -> None:
    """Say how a run went that is done, or was stopped by request with its state saved."""
    how = _how_to_go_on(run, command, stopped_early=reason == EARLY_STOPPING)
    if run.mesh.global_rank == 0:
        _leave(run.run_dir, reason.replace(" ", "_"), EXIT_DONE, run.progress.step, how, "")
    peak = run.memory.peak()
    log.note(memory_comparison(run.predicted_peak, peak.in_use, peak.process))
    log.note(f"stopped at step {run.progress.step} of {run.plan.total_iterations}: {reason}; {how}")


def tell_failure(error: Exception, mesh: ProcessMesh, run_dir: Path | None, run: Run | None, command: str) -> Exception:
    """Leave `exit.json` for a run that an error ended, and return what to raise for it.

    `run` is None where it was never put together. Each rank that fails by itself writes what it knows; one
    that merely lost another leaves what that one wrote.
    """
    error = explained(error, mesh.global_rank)
    follows = isinstance(error, (HangError, LostRankError))
    if isinstance(error, MegatronLiteError):
        cause, code, message, alike = error.cause, error.exit_code, str(error), error.on_all_ranks
    else:
        cause, code, message, alike = "error", EXIT_ERROR, f"{type(error).__name__}: {error}", False
    if not (alike and mesh.global_rank != 0) and not (follows and exit_file.is_there(run_dir)):
        how = f"nothing was trained; the same command tries again: {command}"
        if run is not None:
            how = _how_to_go_on(run, command)
        _leave(run_dir, cause, code, None if run is None else run.progress.step, how, message)
    return error


def explained(error: Exception, rank: int) -> Exception:
    """`error`, or HangError or LostRankError where a collective failed because of another rank."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text:
        return error
    line = text.splitlines()[0]
    if any(words in text for words in _TIMED_OUT):
        return HangError(
            f"rank {rank} waited in vain for another rank: a collective did not end within "
            f"--distributed-timeout-minutes ({line}); raise it where a step, a load or a save may take longer"
        )
    of_the_backend = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    if any(words in text for words in _GONE) or (of_the_backend and not any(words in text for words in _OF_THIS_RANK)):
        return LostRankError(f"another rank is gone, seen by rank {rank}: {line}")
    return error


def _how_to_go_on(run: Run, command: str, stopped_early: bool = False) -> str:
    is_kept = run.keeper.root is None or run.keeper.saved_step == run.progress.step
    if run.progress.step >= run.plan.total_iterations and is_kept:
        return "the run is complete"
    if run.keeper.root is None:
        return "nothing was saved (no --save folder), so the run starts again from step 0"
    if run.keeper.saved_step is None:
        return f"no checkpoint was saved, so the same command starts again from step 0: {command}"
    options, changes = run.config.checkpoint, []
    if options.resume == "never":
        # Given again as it is, the command would refuse the folder, or empty it.
        changes.append(" but for --resume,")
        command += " --resume auto" + (" --no-overwrite" if options.overwrite else "")
    if stopped_early:
        changes.append(" with a larger --early-stopping-patience,")
    comma = "," if changes else ""
    return f"the same command{comma}{''.join(changes)} goes on from step {run.keeper.saved_step}: {command}"


def _leave(run_dir: Path | None, cause: str, code: int, step: int | None, how: str, message: str) -> None:
    if run_dir is None:
        return
    try:
        exit_file.write_exit(run_dir, cause, code, step, how, message)
    except OSError as error:
        log.warn(f"exit.json could not be written: {error}")
