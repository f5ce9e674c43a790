"""Training that waits for its data is told so, once."""

import pytest

from megatron_lite.monitor.data_wait import STEPS, DataWait


def test_the_share_of_a_step():
    assert DataWait(0).share(0.5, 2.0) == 0.25


@pytest.mark.parametrize(("workers", "way_out"), [(0, "give --num-workers 2"), (3, "more --num-workers than 3, or")])
def test_it_is_said_once_when_it_stays_high(capsys, workers, way_out):
    wait = DataWait(workers)
    for _ in range(STEPS - 1):
        wait.share(0.3, 1.0)
    assert not capsys.readouterr().err
    for _ in range(2 * STEPS):
        wait.share(0.3, 1.0)
    said = capsys.readouterr().err
    assert said.count("the data are slower") == 1 and f"for 30% of the last {STEPS} steps: " in said and way_out in said


def test_a_step_now_and_then_is_nothing(capsys):
    wait = DataWait(0)
    for step in range(4 * STEPS):
        wait.share(2.0 if step % STEPS == 0 else 0.1, 1.0 if step % STEPS else 2.1)
    assert not capsys.readouterr().err
