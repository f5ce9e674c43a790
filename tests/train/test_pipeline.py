"""A pipeline trains as one process does: every schedule, with tensor and data ranks and every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from train.layouts import Case, Outcome, assemble, run_cases

TIGHT = 1e-5

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
    ],
    8: [
        Case(pipe=2, tensor=2, data=2, layers=4, virtual=2, micro_batches=2, zero=3, llama=True),
        Case(pipe=2, tensor=2, data=2, layers=4, sequence_parallel=True, micro_batches=2, zero=1),
        Case(pipe=4, data=2, layers=4, schedule="InterleavedZeroBubble", micro_batches=2, zero=2),
    ],
}


def serial_of(case: Case) -> Case:
    """One process, no ZeRO; with dropout the same micro-batches, whose masks are their own."""
    kept = {"micro_batches": case.micro_batches * case.data, "dropout": case.dropout} if case.dropout else {}
    return Case(layers=case.layers, llama=case.llama, optimizer=case.optimizer, **kept)


@pytest.fixture(scope="module")
def serial() -> dict[Case, tuple[Outcome, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    cases = sorted({serial_of(case) for cases in CASES.values() for case in cases}, key=str)
    (outcomes,) = run_on_ranks(run_cases, 1, cases)
    return {
        case: (outcome, assemble(outcome.pieces), assemble(outcome.gradients))
        for case, outcome in zip(cases, outcomes, strict=True)
    }


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the reference's; absolute where the reference is zero (a key bias)."""
    size = reference.norm().item()
    return (ours - reference).norm().item() / (size if size > 1e-5 else 1.0)


@pytest.mark.parametrize("ranks", sorted(CASES))
def test_every_schedule_equals_serial(ranks, serial):
    by_rank = run_on_ranks(run_cases, ranks, CASES[ranks], timeout=400)
    faults = []
    for i, case in enumerate(CASES[ranks]):
        reference, weights, gradients = serial[serial_of(case)]
        outcomes = [outcomes[i] for outcomes in by_rank]
        assert all(outcome.curve == outcomes[0].curve for outcome in outcomes), f"{case}: ranks disagree"
        for step, (ours, theirs) in enumerate(zip(outcomes[0].curve, reference.curve, strict=True)):
            for what, a, b in zip(("loss", "gradient norm"), ours, theirs, strict=True):
                if abs(a - b) > TIGHT * abs(b):
                    faults.append(f"{case}: step {step + 1} {what} {a} against {b}")
        for what, ours, theirs in (
            ("gradient", assemble([p for o in outcomes for p in o.gradients]), gradients),
            ("weight", assemble([p for o in outcomes for p in o.pieces]), weights),
        ):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                if (apart := difference(ours[name], theirs[name])) > TIGHT:
                    faults.append(f"{case}: {what} {name} differs by {apart:.1e}")
    assert not faults, "\n".join(faults)


def test_bf16_follows_the_same_curve_whatever_adds_its_gradients_up(serial):
    cases = [
        Case(pipe=2, layers=4, schedule=schedule, micro_batches=4, zero=zero, dtype="bf16")
        for schedule, zero in (("1F1B", 1), ("ZBVZeroBubble", 1), ("ZBVZeroBubble", 2), ("1F1B", 3))
    ]
    outcomes, _ = run_on_ranks(run_cases, 2, cases, timeout=200)
    (whole,) = run_on_ranks(run_cases, 1, [Case(layers=4, micro_batches=4, zero=1, dtype="bf16")])
    for case, outcome in zip(cases, outcomes, strict=True):
        for ours, theirs in zip(outcome.curve, whole[0].curve, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=5e-3), case
            assert ours[1] == pytest.approx(theirs[1], rel=5e-2), case


def test_adamw8bit_on_stages_that_lack_some_of_its_groups():
    cases = [Case(pipe=2, layers=3, micro_batches=2, zero=zero, optimizer="adamw8bit", llama=True) for zero in (0, 1)]
    plain, sharded = run_on_ranks(run_cases, 2, cases)[0]
    for ours, theirs in zip(sharded.curve, plain.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_schedule_of_ones_own(tmp_path, serial):
    file = tmp_path / "mine.csv"
    # 1F1B for two ranks and two micro-batches, with the weights' gradients of the second stage last.
    file.write_text("0F0,0F1,,,0B0,0B1\n,1F0,1I0,1F1,1I1,1W0,1W1\n")
    case = Case(pipe=2, layers=4, schedule=str(file), micro_batches=2, zero=1)
    outcome = run_on_ranks(run_cases, 2, [case])[0][0]
    for ours, theirs in zip(outcome.curve, serial[serial_of(case)][0].curve, strict=True):
        assert ours == pytest.approx(theirs, rel=TIGHT)
