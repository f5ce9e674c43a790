"""A pipeline trains as one process does: every schedule, with tensor and data ranks and every ZeRO stage."""

from __future__ import annotations

import pytest
from ranks import run_on_ranks
from train.layouts import Case, run_cases
from train.serial import TIGHT, Reference, assert_equals_serial, run_serially, serial_of

CODED = {"optimizer": "adamw8bit"}
HALF = {"dtype": "bf16", "adam_eps": 1e-4}
EMBEDDED = (("position_embedding_type", "rope"), ("untie_embeddings_and_output_weights", True))
"""An embedding that is one matrix and nothing else."""
ONE_HEAD = (("num_query_groups", 1),)
CASES = {
    2: [
        Case(pipe=2, layers=4, schedule="1F1B", micro_batches=4),
        Case(pipe=2, layers=4, schedule="GPipe", micro_batches=4, zero=1, llama=True),
        Case(pipe=2, layers=4, schedule="LoopedBFS", virtual=2, micro_batches=2, zero=2),
        Case(pipe=2, layers=4, virtual=2, micro_batches=4, zero=1, optimizer="sgd"),
        Case(pipe=2, layers=4, schedule="InterleavedZeroBubble", virtual=1, micro_batches=4, zero=1),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=2, llama=True),
        Case(pipe=2, layers=4, schedule="DualPipeV", micro_batches=4, zero=0),
        # One micro-batch, fewer than stages; and layers laid out by hand, unevenly, a stage without any.
        Case(pipe=2, layers=4, schedule="GPipe", micro_batches=1, zero=3),
        Case(pipe=2, layers=4, virtual=2, pipeline_layout="Ett||t|tL", micro_batches=2, zero=1, llama=True),
        Case(pipe=2, layers=4, micro_batches=4, zero=1, recompute="full", loss_chunk_size=20),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=1, recompute="selective"),
        Case(pipe=2, layers=4, micro_batches=2, zero=3, llama=True, recompute="full"),
        # Masks of dropout follow the micro-batch, whatever rank draws them.
        Case(pipe=2, layers=4, schedule="1F1B", micro_batches=2, zero=1, dropout=0.1),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=2, zero=2, dropout=0.1),
        # Layers that are run again, and 8-bit state, in each family of schedules.
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=2, recompute="full", **CODED),
        Case(pipe=2, layers=4, schedule="DualPipeV", micro_batches=4, zero=1, recompute="full", llama=True, **CODED),
        Case(pipe=2, layers=5, schedule="InterleavedZeroBubble", virtual=2, micro_batches=2, recompute="full", **CODED),
        Case(pipe=2, layers=5, virtual=2, micro_batches=2, zero=3, llama=True, **CODED),
        # Stages whose parameters are of fewer groups than others'.
        Case(pipe=2, pipeline_layout="E|ttL", micro_batches=2, zero=2, model=EMBEDDED),
        Case(pipe=2, pipeline_layout="E|ttL", micro_batches=2, zero=3, model=EMBEDDED),
        # 16-bit weights, whose gradients hooks or the schedule itself add up.
        Case(pipe=2, layers=4, micro_batches=4, zero=1, **HALF),
        Case(pipe=2, layers=4, micro_batches=2, zero=3, recompute="full", **HALF),
        Case(pipe=2, layers=4, schedule="LoopedBFS", virtual=2, micro_batches=2, zero=2, llama=True, **HALF),
        Case(pipe=2, layers=4, schedule="ZBVZeroBubble", micro_batches=4, zero=1, recompute="full", **HALF),
        Case(pipe=2, layers=4, schedule="DualPipeV", micro_batches=4, zero=2, llama=True, **HALF),
        Case(pipe=2, layers=4, schedule="InterleavedZeroBubble", virtual=2, micro_batches=2, zero=1, **HALF),
    ],
    4: [
        Case(pipe=4, layers=4, schedule="1F1B", micro_batches=4, zero=1),
        Case(pipe=4, layers=4, schedule="GPipe", micro_batches=2, zero=3, llama=True),
        Case(pipe=2, data=2, layers=4, virtual=2, micro_batches=2, zero=3, llama=True),
        Case(pipe=2, data=2, layers=4, micro_batches=2, zero=2),
        Case(pipe=2, data=2, layers=4, schedule="InterleavedZeroBubble", virtual=2, micro_batches=2, zero=1),
        Case(pipe=2, tensor=2, layers=4, sequence_parallel=True, micro_batches=4, zero=1),
        Case(pipe=2, tensor=2, layers=4, schedule="ZBVZeroBubble", sequence_parallel=True, micro_batches=2, zero=2),
        Case(pipe=2, tensor=2, layers=4, schedule="DualPipeV", micro_batches=4, zero=1, llama=True),
        Case(pipe=2, tensor=2, layers=4, micro_batches=2, zero=3),
        # Tensor ranks that share a key/value head, on a stage that has none.
        Case(pipe=2, tensor=2, pipeline_layout="E|ttL", micro_batches=2, zero=1, llama=True, model=ONE_HEAD),
    ],
    8: [
        Case(pipe=2, tensor=2, data=2, layers=4, virtual=2, micro_batches=2, zero=3, llama=True),
        Case(pipe=2, tensor=2, data=2, layers=4, sequence_parallel=True, micro_batches=2, zero=1),
        Case(pipe=4, data=2, layers=4, schedule="InterleavedZeroBubble", micro_batches=2, zero=2),
    ],
}


@pytest.fixture(scope="module")
def serial() -> dict[Case, Reference]:
    return run_serially(case for cases in CASES.values() for case in cases)


@pytest.mark.parametrize("ranks", sorted(CASES))
def test_every_schedule_equals_serial(ranks, serial):
    assert_equals_serial(ranks, CASES[ranks], serial)


def test_a_schedule_of_ones_own(tmp_path, serial):
    file = tmp_path / "mine.csv"
    # 1F1B for two ranks and two micro-batches, with the weights' gradients of the second stage last.
    file.write_text("0F0,0F1,,,0B0,0B1\n,1F0,1I0,1F1,1I1,1W0,1W1\n")
    case = Case(pipe=2, layers=4, schedule=str(file), micro_batches=2, zero=1)
    outcome = run_on_ranks(run_cases, 2, [case])[0][0]
    for ours, theirs in zip(outcome.curve, serial[serial_of(case)].curve, strict=True):
        assert ours == pytest.approx(theirs, rel=TIGHT)
