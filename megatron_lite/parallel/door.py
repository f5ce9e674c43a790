"""How a tool that runs on one rank or many ends: its errors told once, as the exit code each stands for."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from megatron_lite import log
from megatron_lite.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    HangError,
    LaunchError,
    LostRankError,
    MegatronLiteError,
)
from megatron_lite.parallel.launch import Launch, open_store, watch_launcher


def exit_code_of(act: Callable[[Launch], None]) -> int:
    """Act as the rank that the launcher's environment names; returns this rank's exit code.

    Rank 0 tells an error for all; one of starting is told by the rank that has it, and so are those of `among_ranks`.
    """
    me = Launch()
    try:
        me = Launch.from_environment()
        log.configure(me.rank, me.world_size)
        act(me)
    except MegatronLiteError as error:
        if (me.rank == 0 and not error.is_told_elsewhere) or isinstance(error, LaunchError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE


@contextlib.contextmanager
def among_ranks(me: Launch, timeout_minutes: float) -> Iterator[Any]:
    """Within it the ranks that were launched end together: yields the store they are to be started with, if any.

    The launcher's death ends this process. An error of this rank is told with its number, and ends the others; a rank
    that is lost is named by one of those left.
    """
    over = threading.Event()
    watch_launcher(_end_without_launcher, over)
    try:
        if me.world_size == 1:
            yield None
        else:
            with _called(me, timeout_minutes) as store:
                yield store
    finally:
        over.set()


@contextlib.contextmanager
def _called(me: Launch, timeout_minutes: float) -> Iterator[Any]:
    from megatron_lite.parallel.failure import explained, in_a_line, tell_traceback
    from megatron_lite.parallel.roll_call import RollCall, this_place

    store = open_store(me, timeout_minutes)
    roll = RollCall(store, me.rank, me.world_size, keeper=None if me.store_is_there else 0)
    roll.give_up = lambda error, lost: error.is_told_elsewhere or log.every_rank(f"error: {error}")
    try:
        store.set(f"place {me.rank}", json.dumps(this_place()))
        roll.watch_neighbours([json.loads(store.get(f"place {rank}")) for rank in range(me.world_size)])
        yield store
    except Exception as seen:
        error = explained(seen, me.rank)
        if isinstance(error, (HangError, LostRankError)):
            roll.bound_the_end(error.exit_code)
        if isinstance(error, LostRankError):
            error, _ = roll.named(error)
        elif not getattr(error, "on_all_ranks", False):
            roll.leave(in_a_line(error))
        if not isinstance(error, MegatronLiteError):
            tell_traceback(roll)
            raise SystemExit(EXIT_ERROR) from None
        if not error.on_all_ranks:
            # What several have alike one of them tells.
            error.is_told_elsewhere = error.is_told_elsewhere or not roll.is_first_to(f"tell {error}")
            if me.rank > 0 and not error.is_told_elsewhere and not isinstance(error, LaunchError):
                log.every_rank(f"error: {error}")
        raise error from None
    finally:
        roll.leave()
        roll.close()


def _end_without_launcher() -> None:
    # Nobody may read any more what this rank says.
    try:
        log.every_rank("error: the launcher is gone, and this rank with it")
    finally:
        os._exit(EXIT_LOST_RANK)
