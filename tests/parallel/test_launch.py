"""Being asked to stop: how long a save may take from then on."""

import os
import signal
import time

import pytest

from megatron_lite.parallel import launch
from megatron_lite.parallel.launch import GRACE_SECONDS, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("under_a_launcher", "given", "expected"),
    [(False, None, None), (True, None, GRACE_SECONDS), (False, 100.0, 100.0), (True, 7.0, 7.0)],
)
def test_a_save_is_pressed_where_somebody_kills(under_a_launcher, given, expected, monkeypatch):
    chain = [(os.getpid(), os.getppid())] if under_a_launcher else []
    monkeypatch.setattr(launch, "launcher_chain", lambda: chain)
    stop = StopRequest(given)
    stop.listen()
    try:
        assert stop.deadline() is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "signal SIGTERM"
        left = stop.deadline() and stop.deadline() - time.monotonic()
        assert left == (expected and pytest.approx(expected, abs=1.0))
    finally:
        stop.close()


def test_a_stop_by_the_clock_does_not_press():
    stop = StopRequest(1.0)
    stop.ask("exit duration")
    assert stop.reason == "exit duration" and stop.deadline() is None
