"""The ranks of a tool end together: by an error of one, which is told with its number, and with their launcher."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import ranks

from megatron_lite.errors import EXIT_ERROR, EXIT_LOST_RANK, ConfigError, DataError
from megatron_lite.parallel import roll_call
from megatron_lite.parallel.door import among_ranks, exit_code_of

assert ranks.run_on_ranks, "its import has torch loaded before processes are forked"


def _wait(store) -> None:
    store.wait(["what never comes"], timedelta(minutes=10))


def _one_fails(rank: int, store) -> None:
    if rank == 1:
        raise DataError("its file is damaged")
    _wait(store)


def _all_fail_alike(rank: int, store) -> None:
    store.set(f"here {rank}", "")
    store.wait(["here 0", "here 1", "here 2"])
    raise ConfigError("--stride 0 is too small")


def _one_breaks(rank: int, store) -> None:
    if rank == 2:
        raise ZeroDivisionError("nobody foresaw it")
    _wait(store)


def _all_end(rank: int, store) -> None:
    store.set(f"here {rank}", "")
    store.wait(["here 0", "here 1", "here 2"])


def _rank(rank: int, port: int, act: Callable, connection) -> None:
    roll_call.GIVE_UP_SECONDS = 0.5
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.stderr = said = io.StringIO()
    end = os._exit
    # A rank that cannot get out of where it waits is ended.
    os._exit = lambda code: (connection.send((code, said.getvalue())), end(code))

    def acting(me) -> None:
        with among_ranks(me, timeout_minutes=2) as store:
            act(me.rank, store)

    try:
        code = exit_code_of(acting)
    except SystemExit as ended:
        code = ended.code
    connection.send((code, said.getvalue()))


def _run(act: Callable) -> list[tuple[int, str]]:
    """Exit codes of three ranks, and what each of them said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    processes, pipes = [], [context.Pipe(duplex=False) for _ in range(3)]
    try:
        for rank, (_, sends) in enumerate(pipes):
            processes.append(context.Process(target=_rank, args=(rank, port, act, sends), daemon=True))
            processes[-1].start()
            sends.close()
        for receives, _ in pipes:
            assert receives.poll(90)
        return [receives.recv() for receives, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_an_error_of_one_rank_is_told_with_its_number_and_ends_the_others():
    (first, told_first), (failed, told), (other, told_other) = _run(_one_fails)
    assert (first, failed, other) == (EXIT_LOST_RANK, 2, EXIT_LOST_RANK)
    assert "rank 1/3] error: its file is damaged" in told and "Traceback" not in told
    named = [text for text in (told_first, told_other) if "error: lost rank 1" in text]
    assert len(named) == 1 and "DataError: its file is damaged" in named[0]


def test_an_error_of_all_ranks_is_told_once():
    ended = _run(_all_fail_alike)
    assert [code for code, _ in ended] == [2, 2, 2]
    assert sum(text.count("error: --stride 0 is too small") for _, text in ended) == 1


def test_what_nobody_foresaw_is_told_in_full_by_the_rank_that_has_it():
    ended = _run(_one_breaks)
    assert [code for code, _ in ended] == [EXIT_LOST_RANK, EXIT_LOST_RANK, EXIT_ERROR]
    assert "rank 2/3] Traceback" in ended[2][1] and "ZeroDivisionError: nobody foresaw it" in ended[2][1]


def test_ranks_that_end_well_say_nothing():
    assert _run(_all_end) == [(0, "")] * 3


ENDS_BY_ITSELF = """
import sys, time
from megatron_lite.parallel.door import among_ranks, exit_code_of

def act(me):
    with among_ranks(me, timeout_minutes=2):
        print("ready", flush=True)
        time.sleep({seconds})
    print("done", flush=True)

sys.exit(exit_code_of(act))
"""


@pytest.mark.parametrize(("is_killed", "seconds"), [(True, 60), (False, 2)])
def test_a_rank_ends_with_its_launcher_and_not_before(is_killed, seconds):
    # Its name makes it a launcher; it waits for its child, as those do.
    launcher = ["bash", "-c", 'exec -a torchrun bash -c \'"$0" -c "$1"; exit $?\' "$0" "$1"', sys.executable]
    launcher.append(ENDS_BY_ITSELF.format(seconds=seconds))
    with subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if is_killed:
            process.kill()
            # The pipe is closed by the last that holds it: the rank.
            assert "the launcher is gone, and this rank with it" in process.stderr.read()
            assert process.stdout.read() == ""
        else:
            assert process.stdout.read() == "done\n" and process.wait(60) == 0
