"""The errors a run can end with, and the exit code each stands for.

    code   cause in exit.json                        a rank ended
    0      done, early_stopping, exit_interval, ...  done, or stopped by request, its state saved
    1      checkpoint_not_saved                      done or stopped, its last state lost
    1      error                                     by anything else, out of memory among it
    2      user_error                                by a mistake in flags or files
    3      non_finite                                by a NaN or infinite loss or gradient
    3      replicas_differ                           since ranks differ in what all hold alike
    4      hang                                      since a collective did not end in time
    5      lost_rank                                 since another rank is gone

Launchers change codes on the way, so `exit.json` in the run folder is what tools read.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.credentials import without_credentials

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_HANG = 4
EXIT_LOST_RANK = 5
EXIT_INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C ended."""


class MegatronLiteError(Exception):
    """An error with an exit code, printed without a traceback. Its text has no credentials."""

    exit_code = EXIT_ERROR
    cause = "error"
    on_all_ranks = False
    """Raised on every rank alike, so that rank 0 tells it for all."""
    is_told_elsewhere = False
    """Another rank tells it for all that have it."""

    def __init__(self, *arguments: object):
        super().__init__(*(without_credentials(a) if isinstance(a, str) else a for a in arguments))


class UserError(MegatronLiteError):
    """Something the user can mend. The message gives the numbers and the way out."""

    exit_code = EXIT_USER_ERROR
    cause = "user_error"


class ConfigError(UserError):
    """One or more problems of a configuration, reported together.

    `problems` holds one complete sentence a problem.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(self.problems, 1))
            message = f"{len(self.problems)} problems in the configuration:\n{lines}"
        super().__init__(message)


class DataError(UserError):
    """A dataset, index or text file that cannot be used, with the file and the field."""


class SamplesLost(MegatronLiteError):
    """Samples that cannot be read this time, since a process or a disk failed: another attempt may read them."""


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded or does not fit the data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint whose bytes cannot be read or are not those that were saved: the one before may be whole."""


class KernelError(UserError):
    """Native kernels that are wanted and cannot be found, compiled or loaded."""


class CheckpointNotSaved(MegatronLiteError):
    """A checkpoint lost to a full disk, an I/O error or a deadline. The run may go on without it."""

    cause = "checkpoint_not_saved"


class NonFiniteError(MegatronLiteError):
    """A NaN or infinite loss or gradient: names step, rank and first offending parameter."""

    exit_code = EXIT_NON_FINITE
    cause = "non_finite"
    on_all_ranks = True


class ReplicasDiffer(MegatronLiteError):
    """Ranks that hold something else where all hold the same: memory or arithmetic failed silently."""

    exit_code = EXIT_NON_FINITE
    cause = "replicas_differ"
    on_all_ranks = True


class HangError(MegatronLiteError):
    """A step or collective that did not end in time."""

    exit_code = EXIT_HANG
    cause = "hang"


class LaunchError(UserError):
    """What keeps a rank from meeting the others: it speaks for itself, since nobody else knows."""


class LostRankError(MegatronLiteError):
    """Another rank, or the launcher, is gone."""

    exit_code = EXIT_LOST_RANK
    cause = "lost_rank"
