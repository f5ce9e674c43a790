"""How a run ends: what is said, and what its `exit.json` tells, whatever ended it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_lite import log
from megatron_lite.errors import EXIT_DONE, EXIT_ERROR, HangError, LostRankError, MegatronLiteError
from megatron_lite.monitor import exit_file, rank_log
from megatron_lite.monitor.hang_watch import LONGEST_REPORT_SECONDS, HangWatch
from megatron_lite.parallel.failure import explained, in_a_line
from megatron_lite.parallel.roll_call import Lost, RollCall
from megatron_lite.plan.report import memory_comparison
from megatron_lite.train.loop import EARLY_STOPPING, Run

_LAST_LINES, _RANKS_SHOWN = 12, 2


class Ending:
    """The end of this rank's run. `run` is None until it is put together.

    `command` is how the run was started; `roll` finds out who is lost, where there are other ranks.
    """

    def __init__(self, rank: int, run_dir: Path | None, command: str, roll: RollCall | None = None):
        self.run: Run | None = None
        self.watch: HangWatch | None = None
        self._rank, self._run_dir, self._command = rank, run_dir, command
        self._roll = roll or RollCall(None, rank, 1)
        self._roll.give_up = self._give_up

    @contextlib.contextmanager
    def told(self, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """What ends the run in here is told, `but` for errors of that kind, and raised as what it is."""
        try:
            yield
        except but:
            raise
        except Exception as error:
            told = self.tell_failure(error)
            if told is error:
                raise
            raise told from error

    def tell_end(self, run: Run, reason: str) -> None:
        """Say how a run went that is done, or was stopped by request with its state saved."""
        how = _how_to_go_on(run, self._command, stopped_early=reason == EARLY_STOPPING)
        if self._rank == 0:
            self._leave_word(reason.replace(" ", "_"), EXIT_DONE, how, "")
        peak = run.memory.peak()
        log.note(memory_comparison(run.predicted_peak, peak.in_use, peak.process))
        log.note(f"stopped at step {run.progress.step} of {run.plan.total_iterations}: {reason}; {how}")

    def tell_failure(self, error: Exception) -> Exception:
        """Leave `exit.json` for a run that an error ended, and return what to raise for it.

        Each rank that fails by itself writes what it knows, and has the others told; of those that merely lost
        it one writes, unless it is written already.
        """
        seen, error = error, explained(error, self._rank)
        if isinstance(error, (HangError, LostRankError)):
            hangs = isinstance(error, HangError)
            self._roll.bound_the_end(error.exit_code, longer=LONGEST_REPORT_SECONDS if hangs else 0.0)
        if self.watch is not None:
            self.watch.report(error, seen) if isinstance(error, HangError) else self.watch.close()
        if isinstance(error, LostRankError):
            error = self._who_is_lost(error)
        elif not getattr(error, "on_all_ranks", False):
            self._roll.leave(in_a_line(error))
        else:
            self._roll.leave()
        self._write(error)
        return error

    def _who_is_lost(self, seen: LostRankError) -> LostRankError:
        error, lost = self._roll.named(seen)
        if not error.is_told_elsewhere:
            self._show_last_lines(lost)
        return error

    def _show_last_lines(self, lost: dict[int, Lost]) -> None:
        if self._run_dir is None:
            return
        for rank in [rank for rank, known in lost.items() if not known.spoke][:_RANKS_SHOWN]:
            if lines := rank_log.last_lines(self._run_dir, rank, _LAST_LINES):
                said = "\n".join(f"  {line}" for line in lines)
                log.every_rank(f"rank {rank}'s last lines, in {rank_log.path_of(self._run_dir, rank)}:\n{said}")

    def _give_up(self, error: LostRankError, lost: dict[int, Lost]) -> None:
        self._write(error)
        if error.is_told_elsewhere:
            log.aside(f"error: {error}")
        else:
            self._show_last_lines(lost)
            log.every_rank(f"error: {error}")

    def tell_hang(self, error: HangError) -> None:
        """Leave `exit.json` for a run that hangs and is about to end."""
        self._write(error)

    def _write(self, error: Exception) -> None:
        follows = isinstance(error, (HangError, LostRankError))
        if isinstance(error, MegatronLiteError):
            cause, code, message, alike = error.cause, error.exit_code, str(error), error.on_all_ranks
        else:
            cause, code, message, alike = "error", EXIT_ERROR, f"{type(error).__name__}: {error}", False
        if (alike and self._rank != 0) or (follows and exit_file.is_there(self._run_dir)):
            return
        how = f"nothing was trained; the same command tries again: {self._command}"
        if self.run is not None:
            how = _how_to_go_on(self.run, self._command)
        self._leave_word(cause, code, how, message)

    def _leave_word(self, cause: str, code: int, how: str, message: str) -> None:
        if self._run_dir is None:
            return
        step = None if self.run is None else self.run.progress.step
        try:
            exit_file.write_exit(self._run_dir, cause, code, step, how, message)
        except OSError as error:
            log.warn(f"exit.json could not be written: {error}")


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
