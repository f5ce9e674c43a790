"""Norms that all heads share, on whatever ranks the heads are: every layout trains as one process does."""

from __future__ import annotations

from train.layouts import Case
from train.serial import assert_equals_serial, run_serially

# A norm of what is small at first makes rounding large: layouts drift apart in a few steps of this size.
STEPS = 2
CASES = [
    # Two key/value heads on four tensor ranks: a key head is normed on two of them.
    Case(tensor=4, zero=1, qwen3=True, steps=STEPS),
    Case(tensor=2, data=2, zero=3, sequence_parallel=True, micro_batches=2, qwen3=True, steps=STEPS),
    Case(tensor=2, pipe=2, layers=4, zero=1, micro_batches=4, qwen3=True, steps=STEPS),
    Case(pipe=2, data=2, layers=4, zero=2, schedule="ZBVZeroBubble", micro_batches=2, qwen3=True, steps=STEPS),
    Case(tensor=2, context=2, zero=2, qwen3=True, steps=STEPS, recompute="selective"),
    Case(context=4, exchange="a2a", zero=0, qwen3=True, steps=STEPS),
]


def test_every_layout_equals_serial():
    assert_equals_serial(4, CASES, run_serially(CASES))
