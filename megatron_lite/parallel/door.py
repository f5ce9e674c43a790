"""How a tool that runs on one rank or many ends: its errors told once, as the exit code each stands for."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_lite import log
from megatron_lite.errors import EXIT_DONE, EXIT_INTERRUPTED, LaunchError, MegatronLiteError
from megatron_lite.parallel.launch import Launch


def exit_code_of(act: Callable[[Launch], None]) -> int:
    """Act as the rank that the launcher's environment names; returns this rank's exit code.

    Rank 0 tells an error for all; one of starting is told by the rank that has it.
    """
    me = Launch()
    try:
        me = Launch.from_environment()
        log.configure(me.rank, me.world_size)
        act(me)
    except MegatronLiteError as error:
        if me.rank == 0 or isinstance(error, LaunchError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE
